"""Registries of the package, children of the MMEngine roots.

MMEngine imports this file by itself when a config names a type
``lors_plugin.X``, then the modules in ``locations``. An import error in this
very file would be swallowed, so it imports nothing but MMEngine.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='lors_plugin',
    locations=['lors_plugin.models'],
)

OPTIM_WRAPPERS = Registry(
    'optim_wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='lors_plugin',
    locations=['lors_plugin.engine.optim'],
)

HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='lors_plugin',
    locations=[
        'lors_plugin.engine.hooks',
        'lors_plugin.adapters.hook',
        'lors_plugin.lors.hook',
    ],
)

METRICS = Registry(
    'metric',
    parent=MMENGINE_METRICS,
    scope='lors_plugin',
    locations=['lors_plugin.evaluation'],
)
