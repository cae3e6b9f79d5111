"""The checks of :mod:`lors_plugin.doctor`.

Pure functions of what was found, so that tests can show them a V100 where
there is none. They import nothing of what they judge.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Optional

Capability = tuple[int, int]

DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': (
        'onedl-mmcv',
        'onedl-mmcv-cu128-torch2-8',
        'mmcv',
        'mmcv-lite',
        'mmcv-full',
    ),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}
OLDEST = dict(mmengine='0.10', mmcv='2.0', mmdet='3.2', mmpretrain='1.1')
OPTIONAL = {
    'faster_coco_eval': 'COCO evaluation several times faster',
    'safetensors': 'checkpoints in the safetensors format',
    'tensorboard': 'curves in TensorBoard',
}
V100_REMEDY = (
    'for a V100 take torch 2.8 to 2.10 from the package index (CUDA 12.8), '
    'or a cu126 build of torch up to 2.14'
)
TRANSFORMERS_REMEDY = (
    'pip install "transformers>=4.57,<5"; newer ones in an environment '
    'without mmpretrain'
)
OLDEST_TRITON = (3, 6)
TRITON_OF_TORCH = {
    (2, 6): '3.2', (2, 7): '3.3', (2, 8): '3.4', (2, 9): '3.5',
    (2, 10): '3.6', (2, 11): '3.6', (2, 12): '3.7', (2, 13): '3.7',
    (2, 14): '3.8',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    status: str
    what: str
    remedy: str = ''

    def __str__(self) -> str:
        arrow = f' -> {self.remedy}' if self.remedy else ''
        return f'{self.status:<8} {self.what}{arrow}'


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as the driver or torch names it."""

    name: str
    capability: Capability


def release(version: Optional[str]) -> tuple[int, ...]:
    """Return the leading numbers of a version, '2.14.1+cpu' as (2, 14, 1)."""
    match = re.match(r'\d+(\.\d+)*', version or '')
    return tuple(map(int, match.group().split('.'))) if match else ()


def check_python(version: Sequence[int]) -> Check:
    """Check the version of Python."""
    text = 'Python ' + '.'.join(map(str, version[:3]))
    if tuple(version[:2]) < (3, 10):
        return Check('missing', text, 'Python 3.10 or newer is needed')
    if tuple(version[:2]) > (3, 13):
        return Check('note', f'{text} is newer than what was tested (3.13)')
    return Check('ok', text)


def arch_supported(capability: Capability, archs: Sequence[str]) -> bool:
    """Return whether a build for ``archs`` runs on a GPU of that capability.

    Args:
        capability (tuple[int, int]): Such as (7, 0).
        archs (Sequence[str]): Such as 'sm_86' or 'compute_90'. Binaries run
            on later minors of the same major, PTX on anything later.
    """
    for arch in archs:
        match = re.match(r'(sm|compute)_(\d+)(\d)[a-z]?$', arch)
        if not match:
            continue
        major, minor = int(match.group(2)), int(match.group(3))
        if match.group(1) == 'compute':
            if (major, minor) <= capability:
                return True
        elif major == capability[0] and minor <= capability[1]:
            return True
    return False


def check_torch(
    version: str,
    cuda: Optional[str],
    archs: Sequence[str],
    gpus: Sequence[Gpu],
    available: bool,
) -> list[Check]:
    """Check torch against the GPUs that are there.

    Args:
        version (str): Version of torch.
        cuda (str, optional): CUDA version of the build, None for CPU builds.
        archs (Sequence[str]): Architectures of the build.
        gpus (Sequence[Gpu]): GPUs of the machine.
        available (bool): What ``torch.cuda.is_available()`` says.
    """
    build = f'CUDA {cuda}, {" ".join(archs)}' if cuda else 'CPU build'
    text = f'torch {version} ({build})'
    if release(version) < (2, 4):
        return [Check('missing', text, 'torch 2.4 or newer is needed')]
    checks = [Check('ok', text)]
    if not gpus:
        checks.append(Check('note', 'no GPU: everything runs on the CPU'))
    for gpu in gpus:
        sm = 'sm_{}{}'.format(*gpu.capability)
        what = f'{gpu.name} ({sm})'
        remedy = f'a torch build whose architectures include {sm}'
        if gpu.capability == (7, 0):
            remedy = V100_REMEDY
        if not cuda:
            what += ': torch is a CPU build and will not use it'
            remedy = 'install a CUDA build of torch'
            if gpu.capability == (7, 0):
                remedy += f'; {V100_REMEDY}'
        elif archs and not arch_supported(gpu.capability, archs):
            what += f': this torch build (CUDA {cuda}) has no code for it, '
            what += 'kernels fail with "no kernel image"'
        elif not available:
            what += ': torch cannot use it, usually a driver older than '
            what += f'CUDA {cuda} wants'
            remedy = 'update the driver or take a torch for an older CUDA'
        else:
            checks.append(Check('ok', what))
            continue
        checks.append(Check('trap', what, remedy))
    return checks


def check_mmcv_ops(compiled: bool, error: str, gpus: Sequence[Gpu]) -> Check:
    """Check the compiled operators of MMCV.

    Args:
        compiled (bool): Whether there is a compiled extension.
        error (str): Why it cannot be imported, or ''.
        gpus (Sequence[Gpu]): GPUs of the machine.
    """
    if not compiled:
        return Check(
            'note',
            'mmcv has no compiled operators: all of this package works; a '
            'stock model that calls one (RoIAlign, deformable convolution) '
            'raises an error that names it',
            'for such a model, with torch 2.8 and CUDA 12.8: pip install '
            'onedl-mmcv-cu128-torch2-8 in place of onedl-mmcv; for others '
            'see docs/en/user_guides/gpu.md',
        )
    if error:
        return Check(
            'missing',
            f'the compiled operators of mmcv cannot be loaded: {error}',
            'they were built for another torch: rebuild mmcv, or install '
            'onedl-mmcv, which does without',
        )
    if any(gpu.capability < (7, 5) for gpu in gpus):
        return Check(
            'note',
            'mmcv has compiled operators; ready-made builds have no code '
            'for GPUs before sm_75',
            'if one fails with "no kernel image", build mmcv with '
            'TORCH_CUDA_ARCH_LIST=7.0',
        )
    return Check('ok', 'mmcv has compiled operators')


def check_host(
    name: str,
    version: Optional[str],
    distributions: Sequence[str],
    error: str = '',
    mmcv_version: Optional[str] = None,
) -> Check:
    """Check one host package.

    Args:
        name (str): Its import name.
        version (str, optional): Its version, None if not installed.
        distributions (Sequence[str]): What is installed under that name.
        error (str): Why it cannot be imported, or ''. Defaults to ''.
        mmcv_version (str, optional): Version of MMCV. Defaults to None.
    """
    needed = name != 'mmpretrain'
    bad = 'missing' if needed else 'note'
    use = '' if needed else ' (needed for classification configs only)'
    if version is None and not error:
        return Check(
            bad,
            f'{name} is not installed{use}',
            f'pip install {DISTRIBUTIONS[name][0]} (a fork), or the '
            f'original {name} if the others here are originals',
        )
    text = f'{name} {version} ({", ".join(distributions) or "from source"})'
    if name == 'mmdet' and re.search(r'MMCV==\S+ is used', error):
        return Check(
            'missing',
            f'{text} refuses mmcv {mmcv_version}: it asserts mmcv < 2.2.0',
            'install an mmcv from 2.0 to 2.1 that was built for this torch, '
            'or onedl-mmdetection, which has no such assertion',
        )
    if error:
        return Check(bad, f'{text} fails: {error}{use}', import_remedy(error))
    if len(distributions) > 1:
        return Check(
            'trap',
            f'{text}: several distributions own the import name {name} and '
            'have overwritten each other',
            'uninstall all of them, then install one',
        )
    if release(version) < release(OLDEST[name]):
        return Check(bad, text, f'{name} {OLDEST[name]} or newer is needed')
    return Check('ok', text)


def import_remedy(error: str) -> str:
    """Return what to do about a failed import."""
    if 'transformers' in error:
        return TRANSFORMERS_REMEDY
    if 'libGL' in error or 'libgthread' in error:
        return (
            'OpenCV wants a graphics library: pip install --force-reinstall '
            '--no-deps opencv-python-headless'
        )
    if 'mmcv._ext' in error:
        return 'import lors_plugin.models first: it stands in for mmcv._ext'
    if 'numpy' in error.lower():
        return 'a package was built for another numpy: reinstall that package'
    return 'reinstall it: bash tools/run_tests.sh sets an environment up'


def check_weights_only(torch_version: str, handled: bool) -> Check:
    """Check whether MMEngine can load its own checkpoints.

    Args:
        torch_version (str): Version of torch.
        handled (bool): Whether MMEngine's loader knows ``weights_only``.
    """
    if handled or release(torch_version) < (2, 6):
        return Check('ok', 'mmengine loads its own checkpoints')
    return Check(
        'trap',
        'this mmengine does not know the weights_only default of torch 2.6 '
        'and newer: its own checkpoints fail to load',
        'tools/train.py and tools/test.py handle it; in a script of your '
        'own call lors_plugin.compat.register_safe_globals() first, or '
        'install onedl-mmengine',
    )


def check_triton(
    version: Optional[str],
    torch_version: Optional[str],
    gpus: Sequence[Gpu],
    interpret: bool,
) -> list[Check]:
    """Say what Triton can do here.

    Args:
        version (str, optional): Version of Triton, None if not installed.
        torch_version (str, optional): Version of torch.
        gpus (Sequence[Gpu]): GPUs of the machine.
        interpret (bool): Whether TRITON_INTERPRET=1 is set.
    """
    if version is None:
        return [Check('note', 'no Triton: the PyTorch operators are used')]
    text = f'triton {version}'
    checks = []
    fits = TRITON_OF_TORCH.get(release(torch_version)[:2])
    if fits and release(version)[:2] != release(fits):
        checks.append(
            Check(
                'note',
                f'{text} is not the one that torch {torch_version} was '
                f'released with ({fits})',
            )
        )
    if not gpus:
        mode = (
            'TRITON_INTERPRET=1 is set'
            if interpret
            else (
                'set TRITON_INTERPRET=1 before Triton is imported to try them'
            )
        )
        if release(version)[:2] < OLDEST_TRITON:
            return [*checks, Check('note', f'{text}: {_too_old()}')]
        what = f'{text}, no GPU: kernels run in the interpreter only'
        what += f' ({mode}; float32 and float16, bfloat16 is wrong there)'
        return [*checks, Check('note', what)]
    if interpret:
        return [
            *checks,
            Check(
                'trap',
                'TRITON_INTERPRET=1 is set beside a GPU: kernels run on the '
                'CPU, thousands of times slower',
                'unset TRITON_INTERPRET',
            ),
        ]
    for capability in sorted({gpu.capability for gpu in gpus}):
        checks.append(_check_triton_on(text, release(version), capability))
    return checks


def _too_old() -> str:
    oldest = '.'.join(map(str, OLDEST_TRITON))
    return f'not used, the PyTorch operators run, since kernels need {oldest}'


def _check_triton_on(text, version, capability):
    """Say what a Triton version does on a GPU, see docs on kernels."""
    where = f'{text} on sm_{capability[0]}{capability[1]}'
    # As in ops/backend.py, which this file must not import.
    if version[:2] < OLDEST_TRITON:
        return Check('note', f'{where}: {_too_old()}')
    if capability < (7, 0):
        return Check(
            'note',
            f'{where}: not used, the PyTorch operators run, since kernels '
            'need sm_70',
        )
    if capability >= (8, 0):
        return Check('ok', f'{where}: kernels compile')
    reason = 'float16 products spill registers and use no tensor cores'
    return Check(
        'note',
        f'{where}: {reason}',
        'nothing to do: the kernels of this package compute in float32 there',
    )


def check_threads(policy: str, spins: str, threads: int) -> Check:
    """Check how the threads of a CPU wait for each other.

    Args:
        policy (str): Value of OMP_WAIT_POLICY, '' if it is not set.
        spins (str): Value of GOMP_SPINCOUNT, '' if it is not set.
        threads (int): Threads of PyTorch.
    """
    text = f'{threads} threads compute on the CPU and wait '
    if threads == 1:
        return Check('ok', 'one thread computes on the CPU')
    if policy.upper() == 'PASSIVE':
        return Check('ok', f'{text}asleep (OMP_WAIT_POLICY=PASSIVE)')
    if spins:
        return Check('ok', f'{text}for GOMP_SPINCOUNT={spins}, then sleep')
    return Check(
        'note',
        f'{text}spinning: other work on the same cores makes training many '
        'times slower',
        'export GOMP_SPINCOUNT=10000, as the shell tools do, or '
        'OMP_WAIT_POLICY=PASSIVE',
    )


def check_operators(
    where: str, verdicts: dict[str, tuple[bool, str]], variable: str
) -> Check:
    """Say which implementation of the operators runs on a device.

    Args:
        where (str): Name of the device.
        verdicts (dict[str, tuple[bool, str]]): For each type of products
            whether Triton can be used, and if not the reason.
        variable (str): What LORS_PLUGIN_BACKEND is set to, or ''.
    """
    refused = {name: why for name, (yes, why) in verdicts.items() if not yes}
    if variable in ('torch', 'reference'):
        return Check(
            'note',
            f'operators on {where}: {variable}, as LORS_PLUGIN_BACKEND says',
        )
    if variable == 'triton' and refused:
        return Check(
            'trap',
            f'LORS_PLUGIN_BACKEND=triton fails on {where} '
            f'({_list_reasons(refused)})',
            'unset LORS_PLUGIN_BACKEND',
        )
    if variable not in ('', 'auto', 'triton'):
        return Check(
            'trap',
            f'LORS_PLUGIN_BACKEND={variable} names no backend',
            'auto, torch, triton or reference',
        )
    choices = {}
    kernels = 'triton' if variable == 'triton' else 'triton where checked'
    for name in verdicts:
        choice = 'torch' if name in refused else kernels
        choices.setdefault(choice, []).append(name)
    text = '; '.join(f'{k} for {", ".join(v)}' for k, v in choices.items())
    if refused:
        text += f' ({_list_reasons(refused)})'
    return Check('ok', f'operators on {where}: {text}')


def check_self_check(
    where: str, date: str, taken: Sequence[str], reason: str
) -> Check:
    """Say what the self-check of the Triton kernels found on a GPU.

    Args:
        where (str): Name of the GPU.
        date (str): When it was checked, '' if it was not.
        taken (Sequence[str]): Operators and types whose kernels run.
        reason (str): Why there is no verdict, '' if there is.
    """
    remedy = 'python -m lors_plugin.doctor --gpu'
    if reason:
        status = 'trap' if 'not trusted' in reason else 'note'
        return Check(status, f'self-check on {where}: {reason}', remedy)
    if taken:
        text = f'Triton runs for {", ".join(taken)}, PyTorch for the rest'
    else:
        text = 'the PyTorch operators run'
    return Check(
        'ok', f'self-check on {where}, {date}: {text}', f'{remedy} has more'
    )


def _list_reasons(refused):
    """Each reason once, with the types that it holds for."""
    reasons = {}
    for name, why in refused.items():
        reasons.setdefault(why, []).append(name)
    if len(reasons) == 1:
        return next(iter(reasons))
    return '; '.join(f'{", ".join(v)}: {k}' for k, v in reasons.items())


def check_package(name: str, error: str, use: str = '') -> Check:
    """Check a package that is needed, or with ``use`` an optional one."""
    if not error:
        return Check('ok', name)
    if use:
        what = f'{name} is not there (optional: {use})'
        return Check('note', what, f'pip install {name}')
    return Check('missing', f'{name}: {error}', import_remedy(error))
