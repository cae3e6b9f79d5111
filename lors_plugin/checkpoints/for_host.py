"""Checkpoints as MMEngine may have them: nothing in them is executed."""

import copy
from collections import OrderedDict
from typing import Any

from .convert import ConversionError
from .files import check_content, state_of, unwrapped_key

# Entries that MMEngine executes as Python, in `meta` and `message_hub`.
_CONFIG_TEXTS = ('cfg', 'config')


def content_for_host(content: Any, path: Any) -> dict:
    """Prepare a checkpoint for MMEngine, which trusts what is in it.

    The texts of configs are left out: the runner executes one when it
    resumes, inferencers another. Names of weights are unwrapped, which the
    host does for ``module.`` only, and weights are always its ``state_dict``.

    Args:
        content (Any): What was read.
        path (Any): Where it comes from, for messages.

    Returns:
        dict: A shallow copy.

    Raises:
        ConversionError: See :func:`check_content`.
    """
    # Of a bare state dict with the versions that it carries.
    content = copy.copy(check_content(content, path))
    if isinstance(content.get('meta'), dict):
        content['meta'] = _without_config(content['meta'])
    hub = content.get('message_hub')
    if isinstance(hub, dict) and isinstance(hub.get('runtime_info'), dict):
        info = _without_config(hub['runtime_info'])
        content['message_hub'] = {**hub, 'runtime_info': info}
    found = state_of(content)
    state = _unwrap(found, path)
    # Some hooks of the host look nowhere else.
    if found is content:
        return dict(state_dict=state)
    return {**content, 'state_dict': state}


def _without_config(values: dict) -> dict:
    return {k: v for k, v in values.items() if k not in _CONFIG_TEXTS}


def _unwrap(state: dict, path: Any) -> dict:
    """Unwrap the keys of a state dict and of the versions it carries."""
    odd = [key for key in state if not isinstance(key, str)]
    if odd:
        raise ConversionError(
            f'{path}: a key of its weights is {odd[0]!r}, not a name'
        )
    if all(key == unwrapped_key(key) for key in state):
        return state
    new = OrderedDict((unwrapped_key(k), value) for k, value in state.items())
    versions = getattr(state, '_metadata', None)
    if versions is not None:
        # Those of modules, '' for the whole.
        new._metadata = OrderedDict(
            (unwrapped_key(f'{k}.').rstrip('.'), value)
            for k, value in versions.items()
        )
    return new
