"""Both programs that mix on CPUs."""

import pytest

from lors_plugin.ops import compiled_library


@pytest.fixture(params=['compiled', 'plain'])
def cpu_program(request, monkeypatch):
    """Run the test with the compiled code and with plain PyTorch."""
    if request.param == 'compiled':
        found = compiled_library.find_sets()
        if isinstance(found, str):
            pytest.skip(found)
    variable = 'off' if request.param == 'plain' else ''
    monkeypatch.setenv(compiled_library.ENV_NAME, variable)
    return request.param
