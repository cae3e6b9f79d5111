"""Helpers of tests and tools; nothing else in the package imports them."""

from .golden import Errors, Golden, Progress, relative_error
from .golden_adapter import check_rep_adapter
from .golden_detector import check_detector
from .golden_lors_vit import check_lors_vit
from .golden_ops import (
    check_adamixer_mixing,
    check_lors_mixing,
    check_sampling,
)
from .golden_parameternet import check_parameternet
from .weights import randomize, rule_weight

__all__ = [
    'Errors',
    'Golden',
    'check_golden',
    'randomize',
    'relative_error',
    'rule_weight',
]

_CHECKS = {
    'sampling': check_sampling,
    'adamixer_mixing': check_adamixer_mixing,
    'lors_mixing': check_lors_mixing,
    'lors_vit': check_lors_vit,
    'rep_adapter': check_rep_adapter,
    'parameternet': check_parameternet,
}


def check_golden(
    golden: Golden, progress: Progress = lambda text: None
) -> Errors:
    """Run the port on a golden.

    Args:
        golden (Golden): Of any kind and size.
        progress (Callable): Called with a text before each step that takes
            long. Defaults to nothing.

    Returns:
        dict[str, float]: Largest relative error of every entry. Entries in
        ``golden.noise`` may be off by as much as that.
    """
    if golden.kind == 'detector':
        return check_detector(golden, progress)
    return _CHECKS[golden.kind](golden)
