"""MMDetection's hook that draws predictions, one picture per image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from mmdet.engine.hooks import DetVisualizationHook as _DetVisualizationHook
from mmengine.runner import Runner

from lors_plugin.registry import HOOKS

from .picture_names import picture_names


@HOOKS.register_module()
class DetVisualizationHook(_DetVisualizationHook):
    """Draw predictions; images of the same name do not overwrite each other.

    Pictures of images that have the same name in several folders are written
    to such folders below ``test_out_dir``. All options are MMDetection's.
    """

    def before_test(self, runner: Runner) -> None:
        """Look for images of the same name, on all ranks alike."""
        dataset = runner.test_loop.dataloader.dataset
        infos = map(dataset.get_data_info, range(len(dataset)))
        paths = [info['img_path'] for info in infos]
        self.folders = {
            path: Path(name).parent
            for path, name in zip(paths, picture_names(paths))
        }

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any,
        outputs: Optional[Sequence] = None,
    ) -> None:
        """Draw the images of a batch."""
        out_dir = self.test_out_dir
        for sample in outputs:
            if out_dir is not None:
                folder = self.folders[sample.img_path]
                self.test_out_dir = str(Path(out_dir, folder))
            super().after_test_iter(runner, batch_idx, data_batch, [sample])
        self.test_out_dir = out_dir
