"""``python -m lors_plugin.doctor --gpu``: the Triton kernels on this machine.

What is checked, and how, is in :mod:`lors_plugin.ops.self_check`.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Optional

from .checks import Check, check_self_check

HEADER = (
    'kernels', 'verdict', 'error', 'allowed', 'forward, ms', 'PyTorch',
    'with backward, ms', 'PyTorch', 'GB/s', 'of a copy',
)  # fmt: skip
EXPLANATION = """
'error' is the largest one beside what is allowed, relative to the reference
in float64. Times are medians at the size of the papers where the kernels do
worst beside the PyTorch operators. 'GB/s' is what forward has to read and
write, divided by its time, beside a plain copy. 'auto' takes the kernels that
are right and were faster at every size; backend='triton' of an operator, or
LORS_PLUGIN_BACKEND=triton, orders them all the same, LORS_PLUGIN_BACKEND=torch
orders the PyTorch operators. A verdict holds for this card and these versions.
If kernels are wrong, crash or hang, please open an issue with this output.
"""


def find_indices() -> dict:
    """Return the GPUs that PyTorch sees, one number per kind of card."""
    if importlib.util.find_spec('torch') is None:
        return {}
    import torch

    from lors_plugin.ops import self_check

    if not torch.cuda.is_available():
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        found.setdefault(self_check.find_card(index), index)
    return found


def look_at_verdicts() -> list[Check]:
    """Say what the self-check found on each kind of card, running nothing."""
    from lors_plugin.ops import self_check

    found = []
    for card, index in find_indices().items():
        if self_check.is_off():
            verdict, reason = None, f'{self_check.ENV_NAME}=off'
        else:
            verdict, reason = self_check.find_verdict(index)
        date = verdict.date if verdict else ''
        taken = sorted(verdict.taken) if verdict else ()
        found.append(check_self_check(card.name, date, taken, reason))
    return found


def check_gpus(
    write: Callable[[str], None], command: Optional[Sequence[str]] = None
) -> int:
    """Check the kernels on each kind of card and write what was found.

    Args:
        write (Callable): Takes text.
        command (Sequence[str], optional): The probe; tests have others.

    Returns:
        int: 1 if something could not be checked or kept.
    """
    cards = find_indices()
    if not cards:
        write('PyTorch sees no GPU: there is nothing to check.\n')
        return 1
    import torch

    from lors_plugin.ops import self_check
    from lors_plugin.ops.backend import device_verdict

    options = {} if command is None else dict(command=command)
    failed = False
    for card, index in cards.items():
        write(
            f'{card.name} (compute capability {card.capability}), driver '
            f'{card.driver}, torch {card.torch}, Triton {card.triton}, '
            f'lors_plugin {card.lors_plugin}\n'
        )
        possible, reason = device_verdict('cuda', index, torch.float32)
        if not possible:
            write(f'The PyTorch operators run: {reason}\n')
            continue
        device, place = f'cuda:{index}', ''
        try:
            try:
                verdict = self_check.check(
                    *(card, device),
                    **options,
                    force=True,
                    say=lambda text: write(f'{text}\n'),
                )
            except self_check.CacheError as error:
                place = f"\n'auto' will not know of this: {error}\n"
                verdict = self_check.run(card, device, **options)
        except self_check.SelfCheckError as error:
            write(f'error: {error}\n')
            failed = True
            continue
        failed |= bool(place)
        write(f'\n{describe(verdict)}\n{EXPLANATION}{place}')
    if self_check.is_off():
        write(f"{self_check.ENV_NAME}=off: 'auto' takes no kernels.\n")
    self_check.forget()
    return int(failed)


def describe(verdict) -> str:
    """Return the table of a verdict, and the reasons below it.

    Args:
        verdict (Verdict): See :mod:`lors_plugin.ops.self_check.verdict`.
    """
    from lors_plugin.utils import text_table

    rows, reasons = [HEADER], []
    for name, group in verdict.groups.items():
        errors = [e for size in group.sizes for e in size['errors'].values()]
        error = max(errors, key=lambda e: e[0] / e[1], default=None)
        cells = [f'{e:.1e}' for e in error] if error else ['', '']
        for mode in ('forward', 'full'):
            ms = [size['ms'][mode] for size in group.sizes if size['ms']]
            worst = max(ms, key=lambda pair: pair[0] / pair[1], default=None)
            cells += [f'{m:.3f}' for m in worst] if worst else ['', '']
        speeds = [size['bandwidth'] for size in group.sizes if size['ms']]
        least = min(speeds, default=None)
        cells += [f'{speed:.0f}' for speed in least] if least else ['', '']
        rows.append((name, group.status, *cells))
        reasons.append(f'{name}: {group.reason}')
    return f'{text_table(rows)}\n\n' + '\n'.join(reasons)
