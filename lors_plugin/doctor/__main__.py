"""Look at the environment and say what is wrong with it.

    python -m lors_plugin.doctor [--gpu]

prints one line per check: ``ok``, ``note`` (works, but know this), ``trap``
(something will fail later) or ``missing`` (the package cannot work), then
what was found and the remedy. Exit code 1 if anything is missing.

``--gpu`` runs the Triton kernels on the GPUs of this machine instead, which
takes some minutes, and decides whether ``'auto'`` takes them from now on.
Exit code 1 if they cannot be run, or the result cannot be kept.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Optional

from lors_plugin.compat import explain_import
from lors_plugin.version import __version__

from . import checks, gpus
from .checks import Check, Gpu

HOSTS = ('mmengine', 'mmcv', 'mmdet', 'mmpretrain')


def try_import(name: str) -> str:
    """Import a module and return why that failed, or ''."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            importlib.import_module(name)
    except Exception as error:
        error = explain_import(error)
        text = ' '.join(str(error).split())[:300]
        return f'{type(error).__name__}: {text}'
    return ''


def version_of(*distributions: str) -> Optional[str]:
    """Return the version of the first distribution that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def host_facts(name: str) -> tuple[Optional[str], list[str]]:
    """Return the version of a host package and who installed it.

    Args:
        name (str): The import name.

    Returns:
        tuple[str | None, list[str]]: Version and distributions.
    """
    installed = [d for d in checks.DISTRIBUTIONS[name] if version_of(d)]
    version = version_of(*installed)
    if version is None and importlib.util.find_spec(name):
        module = sys.modules.get(name)
        version = getattr(module, '__version__', 'of unknown version')
    return version, installed


def find_gpus() -> list[Gpu]:
    """Ask the driver for the GPUs of this machine, then torch."""
    query = ['nvidia-smi', '--query-gpu=name,compute_cap']
    try:
        text = subprocess.run(
            [*query, '--format=csv,noheader'],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
        return parse_gpus(text)
    except (OSError, subprocess.SubprocessError, ValueError):
        pass
    if try_import('torch'):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        Gpu(
            torch.cuda.get_device_name(i),
            torch.cuda.get_device_capability(i),
        )
        for i in range(torch.cuda.device_count())
    ]


def parse_gpus(text: str) -> list[Gpu]:
    """Parse lines such as 'Tesla V100-SXM2-16GB, 7.0'."""
    gpus = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, capability = line.rpartition(',')
        major, _, minor = capability.strip().partition('.')
        gpus.append(Gpu(name.strip(), (int(major), int(minor))))
    return gpus


def look_at_torch() -> list[Check]:
    """Check Python, torch and torchvision."""
    found = [checks.check_python(sys.version_info)]
    error = try_import('torch')
    if error:
        return [*found, checks.check_package('torch', error)]
    import torch

    found += checks.check_torch(
        torch.__version__,
        torch.version.cuda,
        torch.cuda.get_arch_list(),
        find_gpus(),
        torch.cuda.is_available(),
    )
    error = try_import('torchvision')
    if not error:
        try:
            boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]])
            kept = torch.ops.torchvision.nms(boxes, torch.ones(2), 0.5)
            if len(kept) != 1:
                error = 'its nms gives wrong results'
        except Exception as reason:
            error = f'its operators do not load ({type(reason).__name__})'
    if error:
        return [
            *found,
            Check(
                'missing',
                f'torchvision: {error}',
                'install the torchvision that was released with torch '
                f'{torch.__version__}',
            ),
        ]
    version = version_of('torchvision')
    return [*found, Check('ok', f'torchvision {version}, operators work')]


def look_at_hosts() -> list[Check]:
    """Check the OpenMMLab packages, by import name."""
    from lors_plugin.compat import has_compiled_ops

    found = []
    modules = dict(mmdet=('mmdet', 'mmdet.models'))
    mmcv_version, _ = host_facts('mmcv')
    for name in HOSTS:
        error = ''
        if importlib.util.find_spec(name) is not None:
            for module in modules.get(name, (name,)):
                error = error or try_import(module)
        version, installed = host_facts(name)
        found.append(
            checks.check_host(name, version, installed, error, mmcv_version)
        )
        if name == 'mmcv' and version is not None and not error:
            compiled = has_compiled_ops()
            error = try_import('mmcv._ext') if compiled else ''
            found.append(checks.check_mmcv_ops(compiled, error, find_gpus()))
        if name == 'mmengine' and version is not None and not error:
            found.append(look_at_checkpoints())
    return found


def look_at_checkpoints() -> Check:
    """Check MMEngine's checkpoint loader."""
    spec = importlib.util.find_spec('mmengine.runner.checkpoint')
    with open(spec.origin, encoding='utf-8') as file:
        handled = 'weights_only' in file.read()
    return checks.check_weights_only(version_of('torch') or '', handled)


def look_at_triton() -> list[Check]:
    """Check Triton, without importing it."""
    return checks.check_triton(
        version_of('triton', 'pytorch-triton', 'triton-windows'),
        version_of('torch'),
        find_gpus(),
        os.environ.get('TRITON_INTERPRET') == '1',
    )


def look_at_operators() -> list[Check]:
    """Say which implementation of the operators each device gets."""
    if try_import('torch'):
        return [Check('missing', 'the operators need torch')]
    import torch

    from lors_plugin.ops import backend

    variable = os.environ.get(backend.ENV_NAME, '')
    version = backend.triton_version()
    interpret = os.environ.get('TRITON_INTERPRET') == '1'
    if not torch.cuda.is_available():
        # What 'auto' takes; Triton in the interpreter is for tests.
        reason = 'Triton kernels run on NVIDIA GPUs'
        verdict = {'all types': (interpret and variable == 'triton', reason)}
        return [
            checks.check_operators('the CPU', verdict, variable),
            look_at_compiled(),
            checks.check_threads(
                os.environ.get('OMP_WAIT_POLICY', ''),
                os.environ.get('GOMP_SPINCOUNT', ''),
                torch.get_num_threads(),
            ),
        ]
    found = []
    for gpu in dict.fromkeys(find_gpus()):
        verdicts = {
            name: backend.triton_verdict(
                'cuda',
                getattr(torch, name),
                version,
                gpu.capability,
                interpret,
                torch.version.hip is not None,
            )
            for name in ('float32', 'float16', 'bfloat16')
        }
        found.append(checks.check_operators(gpu.name, verdicts, variable))
    return found + gpus.look_at_verdicts()


def look_at_compiled() -> Check:
    """Say whether the CPU mixes in compiled code, and in which."""
    from lors_plugin.ops import cpu_library

    try:
        library = cpu_library.load()
    except RuntimeError as error:
        return Check('trap', str(error))
    if library is not None:
        return Check('ok', f'mixing on the CPU is compiled: {library.name}')
    found = cpu_library.find_sets()
    what = 'mixing on the CPU is plain PyTorch, which is slower: '
    if isinstance(found, str):
        remedy = 'with a C++ compiler (Debian: apt install g++), install again'
        return Check('note', what + found, remedy)
    return Check('note', f'{what}{cpu_library.ENV_NAME}=off')


def look_at_packages() -> list[Check]:
    """Check this package and the libraries around it."""
    found = []
    for name in ('numpy', 'scipy.optimize', 'pycocotools.mask', 'matplotlib'):
        found.append(checks.check_package(name, try_import(name)))
    found.append(
        checks.check_package(
            f'lors_plugin {__version__}', try_import('lors_plugin.models')
        )
    )
    for name, use in checks.OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        found.append(checks.check_package(name, '' if there else 'no', use))
    return found


SECTIONS: dict[str, Callable[[], list[Check]]] = {
    'PyTorch and GPU': look_at_torch,
    'OpenMMLab': look_at_hosts,
    'Triton': look_at_triton,
    'Operators': look_at_operators,
    'Packages': look_at_packages,
}


def examine() -> dict[str, list[Check]]:
    """Make all checks.

    Returns:
        dict[str, list[Check]]: The checks of each section. A section that
        fails by itself becomes a trap of its own.
    """
    report = {}
    for title, look in SECTIONS.items():
        try:
            report[title] = look()
        except Exception as error:
            what = f'this check failed ({type(error).__name__}: {error})'
            report[title] = [Check('trap', what, 'please report it')]
    return report


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the report and return 1 if anything is missing."""
    parser = argparse.ArgumentParser(
        prog='python -m lors_plugin.doctor',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--gpu',
        action='store_true',
        help='check the Triton kernels on the GPUs of this machine',
    )
    write = sys.stdout.write
    if parser.parse_args(argv).gpu:
        return gpus.check_gpus(write)
    write(f'lors_plugin {__version__}\n')
    counts = dict.fromkeys(('ok', 'note', 'trap', 'missing'), 0)
    for title, found in examine().items():
        write(f'\n{title}\n')
        for check in found:
            counts[check.status] += 1
            write(f'  {check}\n')
    summary = ', '.join(f'{n} {status}' for status, n in counts.items())
    write(f'\n{summary}\n')
    return int(counts['missing'] > 0)


if __name__ == '__main__':
    sys.exit(main())
