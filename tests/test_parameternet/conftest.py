"""A small trained network, for tests of its programs."""

import copy

import pytest
import torch

from lors_plugin.parameternet.backbone import ParameterNet
from lors_plugin.testing import randomize

TINY = dict(
    width=0.5,
    rows=[
        [(3, 16, 16, 0, 1)],
        [(3, 50, 22, 0, 2)],
        [(5, 72, 40, 0.25, 2), (3, 120, 40, 0.25, 1)],
    ],
)


TRAINED = {}


def make(dtype=torch.float64, **options):
    """A model whose norms have seen images, so that results depend on x."""
    key = repr(options)
    if key not in TRAINED:
        model = ParameterNet(TINY, out_indices=(1, -1), **options)
        model = randomize(model).double().train()
        with torch.no_grad():
            for _ in range(30):
                model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        TRAINED[key] = model.eval()
    return copy.deepcopy(TRAINED[key]).to(dtype)


@pytest.fixture
def tiny():
    """Make a small :class:`ParameterNet`: ``tiny(num_experts=2)``."""
    return make
