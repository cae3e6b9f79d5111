"""What models cost side by side: parameters, multiply-adds, time."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lors_plugin.analysis import count_model, make_forward


@dataclass
class Cost:
    """Of one model.

    Attributes:
        parameters (int): Of the whole model.
        multiply_adds (int): For one image.
        seconds (dict[int, float]): Median time of a forward pass by the
            number of images.
    """

    parameters: int
    multiply_adds: int
    seconds: dict


def measure(
    models: Sequence[nn.Module],
    shape: tuple[int, int],
    batches: Sequence[int] = (1,),
    repeats: int = 10,
) -> list[Cost]:
    """Count and time models on the same machine at the same time.

    Models take turns, so that what else the machine does hits all alike.
    Only ratios of the times mean something.

    Args:
        models (Sequence[nn.Module]): Detectors or classifiers, in evaluation
            mode.
        shape (tuple[int]): Height and width of the images.
        batches (Sequence[int]): Numbers of images to time.
        repeats (int): Passes of each model. Defaults to 10.

    Returns:
        list[Cost]: In the order of the models.
    """
    costs = []
    for model in models:
        forward = make_forward(model, shape)
        total = count_model(model, forward, with_memory=False).total
        costs.append(Cost(total.parameters, total.multiply_adds, {}))
    for batch in batches:
        times = _interleaved(
            [make_forward(model, shape, batch) for model in models], repeats
        )
        for cost, seconds in zip(costs, times):
            cost.seconds[batch] = statistics.median(seconds)
    return costs


@torch.no_grad()
def _interleaved(functions: list, repeats: int) -> list[list[float]]:
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for index in range(len(functions)):
            # Another one begins each time.
            index = (index + repeat) % len(functions)
            start = time.perf_counter()
            functions[index]()
            if repeat:  # the first warms up
                times[index].append(time.perf_counter() - start)
    return times
