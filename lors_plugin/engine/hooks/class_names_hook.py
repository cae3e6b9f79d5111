"""Compare the class names of a checkpoint with those of the data."""

import logging
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from lors_plugin.registry import HOOKS
from lors_plugin.utils import few


@HOOKS.register_module()
class ClassNamesHook(Hook):
    """Warn if a checkpoint has the classes of the data in another order.

    Labels are compared by number, so that every name would be wrong.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the names, where both are known."""
        meta = checkpoint.get('meta')
        saved = meta.get('dataset_meta') if isinstance(meta, dict) else None
        ours = _classes(getattr(runner.visualizer, 'dataset_meta', None))
        theirs = _classes(saved)
        if ours != theirs and sorted(ours) == sorted(theirs):
            print_log(
                'the checkpoint has the classes of the data in another order, '
                f'so that labels and names disagree: {few(theirs, 20)} in the '
                f'checkpoint, {few(ours, 20)} in the data',
                logger='current',
                level=logging.WARNING,
            )


def _classes(dataset_meta: Any) -> list[str]:
    """Return the class names in meta information, or none."""
    classes = None
    if isinstance(dataset_meta, dict):
        classes = dataset_meta.get('classes', dataset_meta.get('CLASSES'))
    if not isinstance(classes, (list, tuple)):
        return []
    return [str(name) for name in classes]
