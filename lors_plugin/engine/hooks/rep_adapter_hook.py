"""Adapters by four lines of a config."""

from operator import attrgetter
from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from lors_plugin.adapters import (
    adapters_of,
    inject_adapters,
    is_adapter_checkpoint,
)
from lors_plugin.adapters.fingerprint import trained_keys, unwrapped
from lors_plugin.adapters.reach import unreached_adapters
from lors_plugin.registry import HOOKS

from .adapter_files import (
    AdapterFiles,
    AdapterOnlyHook,
    check_whole_file,
)
from .remake import is_training, rebuild_optimizer, wrap_again


@HOOKS.register_module()
class RepAdapterHook(Hook):
    """Adapt a part of the model before it trains or is tested.

    RepAdapter, section 3.3. The model gets its adapters before its weights
    are initialised or loaded; keys of the base weights stay, so
    ``load_from`` and ``init_cfg`` take any pretrained file, and files of an
    adapted model are resumed and tested with the same config. The optimizer,
    its schedules and the distributed wrapper are made anew from the config,
    since they were made for the model without adapters.

    What is frozen stays as it was: parameters never get gradients, and
    normalisations with frozen parameters keep their running statistics, as
    they are held in evaluation mode. ``trainable`` names those that train.

    An adapter that no output of the part depends on is an error: at the
    start, where the part runs on the meta device, else after the first step.

    With ``adapter_only`` checkpoints hold what is trained, about a hundredth
    of the weights, and the fingerprint of the base. Such files are resumed
    and tested with the same config: the base then comes from ``base`` or
    ``init_cfg`` and must have that very fingerprint. Files of both kinds are
    always read.

    Args:
        adapter_only (bool): Save adapter files. Defaults to False.
        base (str, optional): Checkpoint of the whole model without adapters,
            loaded after ``init_cfg`` and before anything else; to be used
            instead of ``load_from``, which resuming and testing replace. By
            default adapter files name the ``load_from`` of their training.
        **options: Of :func:`lors_plugin.adapters.inject_adapters`.
    """

    # Before the hooks that copy the model (EMA) and the profilers.
    priority = 'VERY_HIGH'

    def __init__(
        self,
        adapter_only: bool = False,
        base: Optional[str] = None,
        **options: Any,
    ) -> None:
        self.adapter_only = adapter_only
        self.options = options
        self._files = AdapterFiles(base, options)
        self._training = False
        self._waiting: set = set()
        self._handles: list = []
        self._frozen: list = []
        self._held: list = []

    def before_run(self, runner: Runner) -> None:
        """Adapt the model; in training, remake what depends on it."""
        model = unwrapped(runner.model)
        self._training = is_training(runner)
        if adapters_of(model):
            # A second run (train, then test) of the same runner, or adapters
            # that somebody injected before.
            runner.logger.info('RepAdapter: the model has adapters already')
        else:
            report = inject_adapters(model, **self.options)
            runner.logger.info(f'RepAdapter\n{report.table()}')
            wrap_again(runner, model)
            if self._training:
                _check_reached(model, self.options.get('module', 'backbone'))
                rebuild_optimizer(
                    runner, 'lors_plugin.adapters.inject_adapters(model)'
                )
                _let_checkpointing_see_gradients(runner, model)
        if self.adapter_only and not any(
            isinstance(hook, AdapterOnlyHook) for hook in runner.hooks
        ):
            runner.register_hook(AdapterOnlyHook(self._files))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Make an adapter file whole, so that all else can take it."""
        if is_adapter_checkpoint(checkpoint):
            self._files.complete(runner, checkpoint, self._training)
            return
        check_whole_file(unwrapped(runner.model), checkpoint)
        self._files.skip_base()
        if self._training and not runner._resume:
            self._files.source = runner._load_from

    def before_train(self, runner: Runner) -> None:
        """Watch for the first gradient of every adapter."""
        model = unwrapped(runner.model)
        self._files.load_base(runner)
        if self.adapter_only:
            self._files.remember(model)
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        self._held = frozen_norms(model)
        self._waiting = set()
        for name, adapter in adapters_of(model).items():
            if not adapter.up_bias.requires_grad:
                raise RuntimeError(
                    f'the adapter of {name} is frozen, by a hook after '
                    'RepAdapterHook (FreezeHook?) or by the host; adapters '
                    'are there to be trained'
                )
            self._waiting.add(name)
            self._handles.append(
                adapter.up_bias.register_hook(
                    lambda _, name=name: self._waiting.discard(name)
                )
            )

    def before_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
    ) -> None:
        """Keep frozen what is, whatever ``train()`` of the host did."""
        for param in self._frozen:
            param.requires_grad_(False)
        for norm in self._held:
            if norm.training:
                norm.eval()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Say which adapters are never reached, after the first step."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._waiting:
            names = sorted(self._waiting)
            raise RuntimeError(
                f'{len(names)} adapters got no gradient in the first step, '
                f'{names[0]} among them: its layer is never called, lies '
                'behind the outputs that are used, or a frozen part between '
                'it and the loss stops gradients. Exclude it or give other '
                'targets'
            )


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Normalisations whose running statistics belong to the base."""
    trained = trained_keys(model)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and f'{name}.running_mean' not in trained
    ]


def require_input_gradient(layer: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook: recomputing works behind frozen layers, too.

    ``torch.utils.checkpoint`` in its reentrant form, which MMEngine uses,
    forgets all gradients inside if no input requires one.
    """
    if not layer.training:
        return args
    return tuple(
        arg.detach().requires_grad_()
        if isinstance(arg, Tensor)
        and arg.is_floating_point()
        and not arg.requires_grad
        else arg
        for arg in args
    )


def _check_reached(model: nn.Module, part: str) -> None:
    """Fail at the start, where that can be told, and not in the first step."""
    names = unreached_adapters(model.get_submodule(part))
    if names:
        raise ValueError(
            f'no output of {part or "the model"} depends on {len(names)} of '
            f'the adapted layers, {names[0]} among them (out_indices?); '
            'exclude them or give other targets'
        )


def _let_checkpointing_see_gradients(runner: Runner, model: nn.Module) -> None:
    names = runner.cfg.get('activation_checkpointing') or []
    names = [names] if isinstance(names, str) else names
    parts = [attrgetter(name)(model) for name in names]
    # Blocks of the hosts leave the form to PyTorch: reentrant in older ones.
    parts += [m for m in model.modules() if getattr(m, 'with_cp', False)]
    for part in parts:
        if adapters_of(part):
            part.register_forward_pre_hook(require_input_gradient)
