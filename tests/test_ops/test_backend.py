"""The choice of an implementation."""

import pytest
import torch

from lors_plugin.ops import adaptive_mixing
from lors_plugin.ops import adaptive_mixing as public
from lors_plugin.ops.backend import BACKENDS, ENV_NAME, resolve_backend


@pytest.mark.parametrize(
    ('requested', 'variable', 'wanted'),
    [
        ('auto', None, 'torch'),
        ('auto', 'auto', 'torch'),
        ('auto', 'reference', 'reference'),
        ('auto', 'torch', 'torch'),
        ('torch', 'reference', 'torch'),
        ('reference', 'torch', 'reference'),
    ],
)
def test_request_beats_variable(monkeypatch, requested, variable, wanted):
    monkeypatch.delenv(ENV_NAME, raising=False)
    if variable is not None:
        monkeypatch.setenv(ENV_NAME, variable)
    assert resolve_backend(requested) == wanted


def test_unknown_request_names_the_argument():
    with pytest.raises(ValueError, match="backend='fast' is no backend"):
        resolve_backend('fast')


def test_unknown_variable_names_the_variable(monkeypatch):
    monkeypatch.setenv(ENV_NAME, 'fast')
    with pytest.raises(ValueError, match=f"{ENV_NAME}='fast' is no backend"):
        resolve_backend('auto')
    assert resolve_backend('torch') == 'torch'


def test_variable_reaches_the_operator(monkeypatch):
    import sys

    module = sys.modules[public.__module__]
    called = []
    monkeypatch.setattr(
        module,
        '_PATHS',
        {
            name: lambda x, *args, name=name: called.append(name)
            for name in BACKENDS[1:]
        },
    )
    inputs = torch.zeros(1, 1, 1, 2, 2), *torch.zeros(2, 1, 1, 1, 2, 2)
    for variable in ('reference', 'torch'):
        monkeypatch.setenv(ENV_NAME, variable)
        adaptive_mixing(*inputs)
    monkeypatch.delenv(ENV_NAME)
    adaptive_mixing(*inputs)
    assert called == ['reference', 'torch', 'torch']
