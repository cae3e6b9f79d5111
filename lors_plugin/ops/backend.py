"""Which implementation of an operator runs, decided in one place."""

import os

BACKENDS = ('auto', 'torch', 'reference')
ENV_NAME = 'LORS_PLUGIN_BACKEND'


def resolve_backend(requested: str = 'auto') -> str:
    """Turn a request into ``'torch'`` or ``'reference'``.

    Args:
        requested (str): What the caller or the config asks for. ``'auto'``
            leaves the choice to the environment variable
            ``LORS_PLUGIN_BACKEND`` and, without it, to the package.

    Returns:
        str: ``'torch'`` (fast, plain PyTorch, any device) or
        ``'reference'`` (the readable definition of what is right).

    Raises:
        ValueError: If the request or the variable names no backend.
    """
    name, source = requested, 'backend'
    if requested == 'auto':
        name, source = os.environ.get(ENV_NAME, 'auto'), ENV_NAME
    if name not in BACKENDS:
        raise ValueError(
            f'{source}={name!r} is no backend; choose one of {BACKENDS}'
        )
    return 'torch' if name == 'auto' else name
