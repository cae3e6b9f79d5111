"""Change the structure of a model: in a runner, or as a config describes it.

A change is a function of a model, such as :func:`lors_plugin.lors.share_stack`
or :func:`lors_plugin.adapters.inject_adapters`. A config asks for it by a hook
(:class:`StructureHook`), or by an entry that builds a module and changes it
(:func:`build_module`).

What a hook has to renew follows from MMEngine's runner. It builds and wraps
the model when it is made itself; ``train()`` then builds the optimizer and its
schedules, and only after that calls the first hook, ``before_run``. Weights
are initialised and loaded later, into the changed model, and hooks of lower
priority (EMA) copy the changed model. So wrapper, optimizer and schedules are
made anew from the config, here and nowhere else. ``val()`` and ``test()`` have
no optimizer.
"""

import abc
import ast
import functools
import inspect
import textwrap
from copy import deepcopy
from typing import Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lors_plugin.registry import MODELS
from lors_plugin.utils import unwrapped


class StructureHook(Hook, abc.ABC):
    """Change the structure of a runner's model before it runs.

    Subclasses implement :meth:`change`, which ``lors_plugin.build`` calls too.
    """

    # Before the hooks that copy the model (EMA) and the profilers.
    priority = 'VERY_HIGH'

    @abc.abstractmethod
    def change(self, model: nn.Module) -> Optional[str]:
        """Change a model.

        Args:
            model (nn.Module): Not wrapped.

        Returns:
            str, optional: A table of the changes; None if the model has
            them already: in a second run (train, then test) of a runner, or
            as the config describes it.
        """

    def before_run(self, runner: Runner) -> None:
        """Change the model; in training, renew what depends on it."""
        name = type(self).__name__
        _check_runner(runner, name)
        table = self.change(unwrapped(runner.model))
        if table is None:
            runner.logger.info(f'{name}: the model has its structure already')
            return
        runner.logger.info(f'{name}\n{table}')
        rewrap(runner)
        if is_training(runner):
            _rebuild_optimizer(runner, name)


def build_module(
    module: dict, data_preprocessor: Optional[dict] = None
) -> nn.Module:
    """Build the module inside an entry that describes a change of it.

    Args:
        module (dict): Config of any module.
        data_preprocessor (dict, optional): What the runner adds to the config
            of a whole model.

    Returns:
        nn.Module: The module, not changed yet.
    """
    module = deepcopy(module)
    if data_preprocessor is not None:
        module.setdefault('data_preprocessor', data_preprocessor)
    return MODELS.build(module)


@functools.cache
def read_only_layers(kind: type) -> frozenset[str]:
    """Find the layers of a module whose weights are read without a call.

    As ``nn.MultiheadAttention`` does with ``out_proj``, and the attention of
    torchvision's Swin with ``qkv``. By the source of the class, if there is
    one: layers that appear as ``self.name.weight`` or ``self.name.bias`` and
    never as ``self.name`` otherwise. Code that initialises does not count.

    Args:
        kind (type): Class of the module.

    Returns:
        frozenset[str]: Names of the layers in the module.
    """
    read, used = set(), set()
    for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            return frozenset()
        for function in tree.body[0].body:
            name = getattr(function, 'name', '')
            if not any(word in name for word in ('init', 'reset', 'load')):
                _collect_uses(function, read, used)
    return frozenset(read - used)


def _collect_uses(node: ast.AST, read: set[str], used: set[str]) -> None:
    """Sort uses of ``self.name`` into reads of its weights and others."""
    name = _name_of_self(getattr(node, 'value', None))
    if isinstance(node, ast.Attribute) and name is not None:
        (read if node.attr in ('weight', 'bias') else used).add(name)
        return
    own = _name_of_self(node)
    if own is not None:
        used.add(own)
        return
    for child in ast.iter_child_nodes(node):
        _collect_uses(child, read, used)


def _name_of_self(node: Optional[ast.AST]) -> Optional[str]:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == 'self' else None
    return None


def is_training(runner: Runner) -> bool:
    """Tell in ``before_run`` whether ``train()`` runs."""
    optimizer = runner.optim_wrapper
    return optimizer is not None and not isinstance(optimizer, dict)


def rewrap(runner: Runner) -> None:
    """Wrap a model anew whose parameters, or their gradients, changed."""
    if is_model_wrapper(runner.model):
        # The old wrapper must go first, and its gradient hooks with it.
        runner.model = runner.model.module
        runner.model = runner.wrap_model(
            runner.cfg.get('model_wrapper_cfg'), runner.model
        )


def _check_runner(runner: Runner, name: str) -> None:
    """Refuse runners and wrappers whose model cannot be changed any more."""
    model = runner.model
    inner = [m for m in model.modules() if is_model_wrapper(m)]
    replaceable = not inner or (
        inner == [model]
        and isinstance(model, (DataParallel, DistributedDataParallel))
    )
    if isinstance(runner, Runner) and replaceable:
        return
    kind = type(model if inner else runner).__name__
    raise TypeError(
        f'{name} cannot change the model of a {kind}; describe the change in '
        "`model` of the config instead (type='lors_plugin.LORSStack' or "
        "'lors_plugin.AdaptedModel')"
    )


def _rebuild_optimizer(runner: Runner, name: str) -> None:
    optim_cfg = runner.cfg.get('optim_wrapper')
    if not isinstance(optim_cfg, dict):
        raise TypeError(
            f'{name}: the optimizer must be built for the new weights, but '
            'this runner was not made from a config; call '
            'lors_plugin.lors.share_stack(model) or '
            'lors_plugin.adapters.inject_adapters(model) before making it'
        )
    runner.optim_wrapper = runner.build_optim_wrapper(optim_cfg)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(
            runner.cfg.param_scheduler
        )
