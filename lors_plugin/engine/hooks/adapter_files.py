"""Adapter files in a runner: reduced when saved, made whole when loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from lors_plugin.adapters.file_checks import (
    META,
    AdapterFileError,
    check_adapters,
    check_base,
    check_trained,
    few,
    read,
)
from lors_plugin.adapters.files import adapter_meta
from lors_plugin.adapters.fingerprint import (
    base_entries,
    trained_keys,
    unwrapped,
)
from lors_plugin.adapters.inject import CHILD, adapters_of
from lors_plugin.checkpoints import read_weights

EMA = 'module.'


class AdapterFiles:
    """What the hooks of one runner know about adapter files.

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
        needed = model.state_dict().keys() - trained_keys(model)
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
        """Whole weights were loaded, which count."""
        self._to_load = None

    def remember(self, model: nn.Module) -> None:
        """Remember the base as training starts, to see that it stays."""
        self._base = base_entries(model.state_dict(), trained_keys(model))

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
        meta, state, adapters = read(checkpoint)
        model = unwrapped(runner.model)
        check_adapters(model, adapters)
        own = model.state_dict()
        check_trained(own, meta, state)
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
        checkpoint['state_dict'] = {**own, **state}
        averaged = checkpoint.get('ema_state_dict')
        if averaged is not None:
            whole = {EMA + key: value for key, value in own.items()}
            checkpoint['ema_state_dict'] = {**whole, **averaged}
        runner.logger.info(
            f'RepAdapter: an adapter file of {len(meta["adapters"])} layers '
            'fits its base'
        )

    def reduce(self, model: nn.Module, checkpoint: dict) -> None:
        """Leave only what is trained in a checkpoint.

        Raises:
            RuntimeError: If the base is no longer what it was.
        """
        state = checkpoint['state_dict']
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
            keys = [EMA + key for key in meta['keys']]
            own = [key for key in averaged if not key.startswith(EMA)]
            checkpoint['ema_state_dict'] = _only(averaged, [*own, *keys])

    def _ways_to_the_base(
        self, runner: Runner, meta: dict, training: bool
    ) -> Iterator[None]:
        """Bring in one base after the other; MMEngine tests without any."""
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
        """Leave only what is trained."""
        self._files.reduce(unwrapped(runner.model), checkpoint)


def check_whole_file(model: nn.Module, checkpoint: dict) -> None:
    """Check the adapters in a checkpoint of a whole model, if it has any.

    MMEngine would load what fits and leave the rest as initialised.

    Raises:
        ValueError: If they are others than those of the model.
    """
    state = checkpoint.get('state_dict', checkpoint)
    inside = f'.{CHILD}.'
    layers = {
        key.partition(inside)[0].removeprefix(EMA)
        for key in state
        if inside in key
    }
    adapters = adapters_of(model)
    shapes = [
        key
        for key, value in model.state_dict().items()
        if inside in key and key in state and state[key].shape != value.shape
    ]
    odd = sorted(layers ^ adapters.keys()) if layers else []
    if odd or shapes:
        raise ValueError(
            'the checkpoint has other adapters than RepAdapterHook of this '
            f'config makes: {len(odd)} layers are adapted on one side only '
            f'({few(odd)}), {len(shapes)} weights have another shape '
            f'({few(shapes)}). Use the options of its training'
        )


def _only(state: dict[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    return {key: state[key] for key in keys}
