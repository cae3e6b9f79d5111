"""Measure the accuracy of an exported file on the test set of a config."""

from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, DefaultScope

from lors_plugin.deploy.runtime import Classifier, Detector


def evaluate(
    model: Union[Detector, Classifier],
    cfg: Mapping,
    number: Optional[int] = None,
) -> dict[str, float]:
    """Evaluate from files of images to metrics.

    Images go through the runtime alone; the config's data set tells which
    they are and what is right, and its ``test_evaluator`` computes metrics.

    Args:
        model (Detector | Classifier): A classifier gives the scores of all
            classes (``top=None``).
        cfg (Config | dict): The whole config.
        number (int, optional): Evaluate the first images only.

    Returns:
        dict[str, float]: What the evaluator reports.

    Raises:
        ValueError: If the config does not say what to evaluate on.
    """
    loader, metrics = cfg.get('test_dataloader'), cfg.get('test_evaluator')
    if not loader or not metrics:
        raise ValueError(
            'the config has no test_dataloader and test_evaluator, so that '
            'there is nothing to evaluate on'
        )
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        dataset = DATASETS.build(loader['dataset'])
        evaluator = Evaluator(metrics)
        evaluator.dataset_meta = dataset.metainfo
        number = min(number or len(dataset), len(dataset))
        infos = [dataset.get_data_info(index) for index in range(number)]
        found = model.stream(info['img_path'] for info in infos)
        for index, result in enumerate(found):
            data = dataset[index]
            sample = _with_result(data['data_samples'], result)
            evaluator.process([sample], dict(data, inputs=[data['inputs']]))
        return evaluator.evaluate(number)


def _with_result(sample: Any, result: Mapping) -> Any:
    """Put what was found into a data sample of the host."""
    from mmengine.structures import InstanceData

    values = {key: torch.as_tensor(value) for key, value in result.items()}
    if 'boxes' in values:
        sample.pred_instances = InstanceData(
            bboxes=values['boxes'],
            scores=values['scores'],
            labels=values['labels'],
        )
        return sample
    scores = torch.zeros_like(values['scores'])
    scores[values['labels']] = values['scores']
    return sample.set_pred_score(scores).set_pred_label(scores.argmax())


def main_metric(metrics: Mapping[str, float]) -> tuple[str, float]:
    """Return the name and the value of the metric that counts.

    Args:
        metrics (Mapping): Of :func:`evaluate`; the first one counts, as it
            does for the best checkpoint of a run with ``save_best='auto'``.
    """
    return next(iter(metrics.items()))
