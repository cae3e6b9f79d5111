"""Adapters by four lines of a config."""

import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from lors_plugin.checkpoints import read_weights
from lors_plugin.registry import HOOKS
from lors_plugin.structure import StructureHook, is_training
from lors_plugin.utils import few, part_of, unwrapped

from .checkpoint import (
    META,
    AdapterFileError,
    adapter_meta,
    base_entries,
    check_adapters,
    check_base,
    check_trained,
    is_adapter_checkpoint,
    read_adapter_file,
    trained_keys,
)
from .inject import adapters_of, fill, inject_adapters
from .methods import (
    CHILDREN,
    SELECTIONS,
    entries_of,
    is_adapter_key,
    names_in_files,
)
from .peft import lora_of

EMA = 'module.'


@HOOKS.register_module()
class RepAdapterHook(StructureHook):
    """Adapt a part of the model before it trains or is tested.

    By RepAdapter (section 3.3) or another ``method``. The model gets its
    adapters before its weights are initialised or loaded; keys of the base
    weights stay, so ``load_from`` and ``init_cfg`` take any pretrained file,
    and files of an adapted model are resumed and tested with the same config.
    A model that ``lors_plugin.AdaptedModel`` built keeps its adapters.

    What is frozen stays as it was: parameters never get gradients, and
    normalisations with frozen parameters keep their running statistics, as
    they are held in evaluation mode. ``trainable`` names those that train.

    An adapter that no output of the part depends on is an error: at the
    start, where :func:`inject_adapters` can tell, else after the first step.

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

    def __init__(
        self,
        adapter_only: bool = False,
        base: Optional[str] = None,
        **options: Any,
    ) -> None:
        self.adapter_only = adapter_only
        self.options = options
        self._files = AdapterFiles(base, options)
        self._method = options.get('method', 'rep_adapter')
        self._tuned: Optional[nn.Module] = None
        self._training = False
        self._waiting: set = set()
        self._handles: list = []
        self._frozen: list = []
        self._held: list = []

    def change(self, model: nn.Module) -> Optional[str]:
        """Inject adapters, unless the model has some already."""
        if adapters_of(model) or self._tuned is model:
            return None
        report = inject_adapters(model, **self.options)
        self._tuned = model if self._method in SELECTIONS else None
        return report.table()

    def before_run(self, runner: Runner) -> None:
        """Adapt the model and prepare what reads and writes its files."""
        super().before_run(runner)
        self._training = is_training(runner)
        if self._training:
            _require_input_gradients(runner)
        if self.adapter_only and not any(
            isinstance(hook, AdapterOnlyHook) for hook in runner.hooks
        ):
            runner.register_hook(AdapterOnlyHook(self._files))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the base to an adapter file, so that the runner can load it."""
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
        if self.options.get('peft') is not None and not runner._resume:
            # Initialising has overwritten what was trained beside the LoRA.
            host = part_of(model, self.options.get('module', 'backbone'))
            fill(host, lora_of(host, self.options['peft'])[1])
        if self.adapter_only:
            self._files.remember(model)
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        self._held = frozen_norms(model)
        self._waiting = set()
        for name, adapter in adapters_of(model).items():
            watched = adapter.first_trained
            if not watched.requires_grad:
                raise RuntimeError(
                    f'the adapter of {name} is frozen, by a hook after '
                    'RepAdapterHook (FreezeHook?) or by the host; adapters '
                    'are there to be trained'
                )
            self._waiting.add(name)
            self._handles.append(
                watched.register_hook(
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
        """Report adapters without a gradient, after the first step."""
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


class AdapterFiles:
    """Reduce adapter files when saved, and complete them when loaded.

    Args:
        base (str, optional): Checkpoint of the base, by the config.
        options (dict): Of ``inject_adapters``.

    Attributes:
        source (str, optional): Where the base came from besides ``init_cfg``;
            new files name it.
    """

    def __init__(self, base: Optional[str], options: dict[str, Any]) -> None:
        self.source = base
        self._options = options
        self._to_load = base
        self._base: dict[str, str] = {}

    def load_base(self, runner: Runner) -> None:
        """Load the base that the config names, unless that was done."""
        if self._to_load is None:
            return
        path, self._to_load = self._to_load, None
        model = unwrapped(runner.model)
        state = read_weights(path)
        names, trained = names_in_files(model), trained_keys(model)
        needed = {names[key] for key in names.keys() - trained}
        lacking = sorted(needed - state.keys())
        if lacking:
            raise ValueError(
                f'RepAdapterHook: base={path} lacks {len(lacking)} of '
                f'{len(needed)} frozen weights of the model: '
                f'{few(lacking)}. A checkpoint of a backbone alone '
                'belongs to its init_cfg'
            )
        load_state_dict(model, state, logger=runner.logger)
        runner.logger.info(f'RepAdapter: the base is loaded from {path}')

    def skip_base(self) -> None:
        """Leave the base out, as whole weights were loaded."""
        self._to_load = None

    def remember(self, model: nn.Module) -> None:
        """Remember the base as training starts, to check that it stays."""
        self._base = base_entries(entries_of(model), trained_keys(model))

    def complete(
        self, runner: Runner, checkpoint: dict, training: bool
    ) -> None:
        """Add the base to an adapter checkpoint, if it is the right one.

        Args:
            runner (Runner): Its model has adapters.
            checkpoint (dict): Changed in place.
            training (bool): Whether the weights were initialised, which
                MMEngine does for training only.
        """
        file = read_adapter_file(checkpoint)
        meta = file.meta
        model = unwrapped(runner.model)
        check_adapters(model, file.adapters)
        own = entries_of(model)
        check_trained(own, file)
        for _ in self._ways_to_the_base(runner, meta, training):
            try:
                check_base(own, meta)
            except AdapterFileError as error:
                problem = error
            else:
                break
        else:
            raise problem
        self.source = self.source or meta.get('source')
        names = names_in_files(model)
        own = {names[key]: value for key, value in own.items()}
        new = {names[key]: value for key, value in file.state.items()}
        checkpoint['state_dict'] = {**own, **new}
        averaged = checkpoint.get('ema_state_dict')
        if averaged is not None:
            whole = {EMA + key: value for key, value in own.items()}
            checkpoint['ema_state_dict'] = {**whole, **averaged}
        runner.logger.info(
            f'RepAdapter: an adapter file of {len(meta["adapters"])} layers '
            'fits its base'
        )

    def reduce(self, model: nn.Module, checkpoint: dict) -> None:
        """Leave the trained entries of a checkpoint.

        Raises:
            RuntimeError: If the base is no longer what it was.
        """
        names = names_in_files(model)
        state = checkpoint['state_dict']
        state = {key: state[name] for key, name in names.items()}
        meta = adapter_meta(model, state, self._options)
        changed = [
            k for k, v in meta['base'].items() if self._base.get(k) != v
        ]
        if self._base and changed:
            raise RuntimeError(
                f'{len(changed)} frozen weights or statistics changed in '
                f'training, {changed[0]} among them, so adapters cannot be '
                'kept without them. Name them in trainable, or set '
                'adapter_only=False'
            )
        meta['source'] = self.source
        checkpoint['meta'][META] = meta
        checkpoint['state_dict'] = _only(state, meta['keys'])
        averaged = checkpoint.get('ema_state_dict')
        if averaged is not None:
            keys = [EMA + names[key] for key in meta['keys']]
            own = [key for key in averaged if not key.startswith(EMA)]
            checkpoint['ema_state_dict'] = _only(averaged, [*own, *keys])

    def _ways_to_the_base(
        self, runner: Runner, meta: dict, training: bool
    ) -> Iterator[None]:
        """Load one base after the other; MMEngine tests without any."""
        yield
        model = unwrapped(runner.model)
        if not training and hasattr(model, 'init_weights'):
            model.init_weights()
            yield
        if self._to_load is not None:
            self.load_base(runner)
            yield
        source = meta.get('source')
        if source is None or source == self.source:
            return
        if '://' in source or not Path(source).is_file():
            runner.logger.error(
                'RepAdapter: the training of the adapters began with '
                f'{source}; give it as base=... to RepAdapterHook'
            )
            return
        self._to_load = source
        self.load_base(runner)
        yield


class AdapterOnlyHook(Hook):
    """Reduce checkpoints, after all other hooks (EMA) have seen them."""

    priority = 'LOWEST'

    def __init__(self, adapter_files: AdapterFiles) -> None:
        self._files = adapter_files

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leave the trained entries."""
        self._files.reduce(unwrapped(runner.model), checkpoint)


def check_whole_file(model: nn.Module, checkpoint: dict) -> None:
    """Check the adapters in a checkpoint of a whole model, if it has any.

    MMEngine would load what fits and leave the rest as initialised.

    Raises:
        ValueError: If they are others than those of the model.
    """
    state = checkpoint.get('state_dict', checkpoint)
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    odd = [key for key in state if not isinstance(key, str)]
    if odd:
        raise ValueError(
            f'{odd[0]!r} in the checkpoint is no name of a weight'
        )
    inside = re.compile(rf'\.(?:{"|".join(CHILDREN)})\.')
    layers = {
        inside.split(key)[0].removeprefix(EMA)
        for key in state
        if is_adapter_key(key)
    }
    own = model.state_dict()
    # Not by the names of modules: wrappers of MMPretrain rename their keys.
    adapters = {inside.split(key)[0] for key in own if is_adapter_key(key)}
    shapes = [
        key
        for key, value in own.items()
        if is_adapter_key(key)
        and key in state
        and state[key].shape != value.shape
    ]
    odd = sorted(layers ^ adapters) if layers else []
    if odd or shapes:
        raise ValueError(
            'the checkpoint has other adapters than RepAdapterHook of this '
            f'config makes: {len(odd)} layers are adapted on one side only '
            f'({few(odd)}), {len(shapes)} weights have another shape '
            f'({few(shapes)}). Use the options of its training'
        )


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Find the norms whose running statistics belong to the base."""
    trained = trained_keys(model)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and f'{name}.running_mean' not in trained
    ]


def require_input_gradient(layer: nn.Module, args: tuple) -> tuple:
    """Let recomputing work behind frozen layers (a forward pre-hook).

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


def _require_input_gradients(runner: Runner) -> None:
    """Prepare the parts of a model that recompute in backward."""
    model = unwrapped(runner.model)
    names = runner.cfg.get('activation_checkpointing') or []
    names = [names] if isinstance(names, str) else names
    parts = [attrgetter(name)(model) for name in names]
    # Blocks of the hosts leave the form to PyTorch: reentrant in older ones.
    parts += [m for m in model.modules() if getattr(m, 'with_cp', False)]
    for part in parts:
        hooks = part._forward_pre_hooks.values()
        if adapters_of(part) and require_input_gradient not in hooks:
            part.register_forward_pre_hook(require_input_gradient)


def _only(state: dict[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    return {key: state[key] for key in keys}
