"""The few places where a host package falls short of what we need.

Nothing outside this file patches a host.
"""

import ast
import codecs
import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

_EXT_NAME = 'mmcv._ext'
_NAME = 'lors_plugin'


class MissingOpError(RuntimeError):
    """A compiled MMCV operator was called but MMCV has none."""


class _ExtFallback(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand in for ``mmcv._ext`` where MMCV was installed without it.

    ``mmdet.models`` imports ``mmcv.ops`` as a whole, although most detectors
    need none of its compiled operators. The finder is the last one asked, so
    a compiled extension always wins.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname == _EXT_NAME:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.LORS_PLUGIN_FALLBACK = True
        module.__getattr__ = _missing_op


def _missing_op(name):
    if name.startswith('__'):
        raise AttributeError(name)
    if name == 'nms':
        return _nms

    def missing(*args, **kwargs):
        raise MissingOpError(
            f'mmcv was installed without compiled operators and "{name}" '
            'has no replacement here. Install a compiled mmcv for your torch '
            'and GPU; `python -m lors_plugin.doctor` tells what is there.'
        )

    missing.__name__ = name
    return missing


def _nms(boxes, scores, iou_threshold, offset):
    """``mmcv._ext.nms`` by torchvision; kept indices, best score first."""
    if offset != 0:
        raise MissingOpError(
            'mmcv was installed without compiled operators and nms with '
            f'offset={offset} has no replacement here; use offset=0.'
        )
    from torchvision.ops import nms

    return nms(boxes, scores, iou_threshold)


def install_mmcv_ext_fallback() -> None:
    """Make ``mmcv.ops`` importable without compiled operators."""
    if not any(isinstance(f, _ExtFallback) for f in sys.meta_path):
        sys.meta_path.append(_ExtFallback())


def has_compiled_ops() -> bool:
    """Return whether MMCV has its compiled operators (imports ``mmcv``)."""
    spec = importlib.util.find_spec(_EXT_NAME)
    return spec is not None and not isinstance(spec.loader, _ExtFallback)


# Messages of the hosts about their own code, on which a user can do nothing.
_HARMLESS = re.compile(
    '"FileClient" will be deprecated'
    '|"HardDiskBackend" is the alias'
    '|`save_param_scheduler` is True but'
    # Of each frozen parameter that an optimizer leaves out.
    r'|\S+ is skipped since its requires_grad=False'
)


def filter_warnings() -> None:
    """Leave out a warning of MMDetection that is not true here.

    Without faster-coco-eval, pycocotools computes the metrics.
    """
    warnings.filterwarnings('ignore', 'faster_coco_eval is not installed')


def drop_debug_messages() -> None:
    """Keep DEBUG messages off the screen where there is no logger.

    MMEngine prints what is logged without one, whatever its level: the forks
    say at each import that they found no data sets of their maker.
    """
    from mmengine import logging as host

    host_print_log = host.print_log
    if hasattr(host_print_log, 'by_host'):
        return

    @functools.wraps(host_print_log)
    def print_log(msg, logger=None, level=logging.INFO):
        if logger is not None or level > logging.DEBUG:
            host_print_log(msg, logger, level)

    print_log.by_host = host_print_log
    host.print_log = print_log


def is_worth_telling(record: logging.LogRecord) -> bool:
    """Return False for messages of the hosts about their own code.

    For :meth:`logging.Logger.addFilter`.
    """
    return not _HARMLESS.match(record.getMessage())


def explain_import(error: Exception) -> Exception:
    """Name the cause of an import that fails beside transformers 5.

    MMDetection imports MMPretrain, which derives classes from ones that
    transformers has no more; ``TypeError: NoneType takes no arguments`` is
    what comes of it.

    Args:
        error (Exception): Of an import.

    Returns:
        Exception: An ImportError that names the cause, or else the error.
    """
    try:
        version = metadata.version('transformers')
    except metadata.PackageNotFoundError:
        return error
    if int(version.partition('.')[0]) < 5 or (
        'NoneType takes no arguments' not in str(error)
    ):
        return error
    return ImportError(
        'mmpretrain, which mmdet imports, does not work with transformers '
        f'{version}; pip install "transformers>=4.57,<5"'
    )


def package_folder(package: str, kind: str) -> Path:
    """Return the folder of the tools or configs that a package brings along.

    Args:
        package (str): An importable package, such as ``mmdet``.
        kind (str): 'tools' or 'configs'.

    Returns:
        Path: The folder, which may not exist.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise FileNotFoundError(f'{package} is not installed')
    root = Path(spec.origin).parent
    folder = root / '.mim' / kind
    if package == _NAME and not folder.is_dir():
        return root.parent / kind  # a checkout on the path
    return folder


def register_configs() -> None:
    """Let configs inherit ours as ``_base_ = 'lors_plugin::...'``.

    ``mmengine.hub.get_config`` knows them too. MMEngine has a list of
    packages, and looks for all types of such a config in the package that
    it comes from; ours name types of the hosts, which their own
    ``default_scope`` finds. It also reads all metafiles of a package for each
    config that is inherited from there, which takes seconds: now once.
    """
    from mmengine.config import Config, utils

    utils.MODULE2PACKAGE.setdefault(_NAME, _NAME)
    # MMEngine looks for MMSegmentation under the name of the original
    # package only; its module has the same name in the fork.
    utils.MODULE2PACKAGE['mmseg'] = 'mmseg'
    host_fromfile = Config.fromfile
    if hasattr(host_fromfile, 'by_host'):
        return
    utils.load = functools.cache(utils.load)

    @functools.wraps(host_fromfile)
    def fromfile(*args, **kwargs):
        config = host_fromfile(*args, **kwargs)
        _remove_scope(config)
        return config

    fromfile.by_host = host_fromfile
    Config.fromfile = staticmethod(fromfile)


@contextlib.contextmanager
def changed_configs(change: Callable[[ast.Module], ast.Module]) -> Iterator:
    """Change the syntax trees of configs that MMEngine evaluates in a block.

    Args:
        change (Callable): Takes and returns the tree of a file in Python, of
            which MMEngine has removed ``_base_``.
    """
    from mmengine.config import config as host

    original = host.RemoveAssignFromAST

    class Changed(original):
        def visit(self, node):
            node = super().visit(node)
            return change(node) if isinstance(node, ast.Module) else node

    host.RemoveAssignFromAST = Changed
    try:
        yield
    finally:
        host.RemoveAssignFromAST = original


def _remove_scope(part):
    """Remove what MMEngine adds to entries of our configs."""
    if isinstance(part, (list, tuple)):
        for item in part:
            _remove_scope(item)
    elif hasattr(part, 'items'):
        if part.get('_scope_') == _NAME:
            del part['_scope_']
        for _, value in part.items():
            _remove_scope(value)


def repair_grounding_dino() -> None:
    """Let Grounding DINO run in onedl-mmdetection 3.5 (imports ``mmdet``).

    There the decoder of DINO encodes boxes by ``4 * embed_dims`` numbers;
    that of Grounding DINO uses it and reads ``2 * embed_dims``, as published
    weights do. Other versions are left as they are.
    """
    from mmdet.models.layers.transformer import grounding_dino_layers

    decoder = grounding_dino_layers.GroundingDinoTransformerDecoder
    host_init = decoder._init_layers
    if hasattr(host_init, 'by_host'):
        return

    @functools.wraps(host_init)
    def init_layers(self):
        host_init(self)
        self.ref_point_head.register_forward_pre_hook(published_encoding)

    init_layers.by_host = host_init
    decoder._init_layers = init_layers


def published_encoding(head, args):
    """Reduce an encoding of boxes to what a layer reads (a pre-hook).

    With twice as many frequencies, every other one is one of the former.
    """
    if args[0].shape[-1] != 2 * head.layers[0].in_features:
        return args
    pairs = args[0].unflatten(-1, (-1, 2, 2))  # (..., pairs, 2, sine/cosine)
    return (pairs[..., 0, :].flatten(-2),)


def _history_method(owner, name):
    """Stand in for ``getattr`` in a checkpoint: find a method of a history."""
    from pickle import UnpicklingError

    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in _HISTORY_METHODS:
        raise UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed')
    return getattr(owner, name)


_HISTORY_METHODS = ('min', 'max', 'current', 'mean')
# The unpickler of torch finds stand-ins by these names.
_history_method.__module__ = 'builtins'
_history_method.__name__ = _history_method.__qualname__ = 'getattr'


def _renamed(function, module):
    """A stand-in for ``function`` under the module of another NumPy.

    NumPy 2 moved ``numpy.core`` to ``numpy._core``; files hold the name of
    the version that wrote them.
    """

    def stand_in(*args):
        return function(*args)

    stand_in.__module__ = module
    stand_in.__name__ = stand_in.__qualname__ = function.__name__
    return stand_in


def register_safe_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read MMEngine's checkpoints.

    From torch 2.6 on that is the default, and MMEngine 0.10.7 cannot resume
    from its own files, which hold the log history. Naming those few harmless
    classes keeps the safe loading; nothing else becomes loadable. A history
    refers to its own methods by ``getattr``, which may do just that here.
    """
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer

    core = getattr(np, '_core', None) or np.core
    makers = (core.multiarray._reconstruct, core.multiarray.scalar)
    spellings = ('numpy.core.multiarray', 'numpy._core.multiarray')
    dtypes = {
        type(np.dtype(name))
        for name in ('float64', 'float32', 'int64', 'int32', 'bool')
    }
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            _history_method,
            # Scalars of NumPy need it; torch allows it itself from 2.5 on.
            codecs.encode,
            np.ndarray,
            np.dtype,
            *makers,
            *(
                _renamed(maker, module)
                for maker in makers
                for module in spellings
                if module != maker.__module__
            ),
            *dtypes,
        ]
    )


def read_safely(trust: bool = False) -> None:
    """Let the hosts read checkpoints and data files by our readers.

    MMEngine executes the text of a config that a checkpoint holds when it
    resumes, and so do inferencers that get no config; its fork reads a file
    all the same that PyTorch refused as unsafe; pickles and YAML files of a
    data set may run code. For the whole process. Every tool calls it; call
    it yourself before ``init_detector``, an inferencer or a runner of your
    own reads a file from others.

    Args:
        trust (bool): Allow files to run code of their own while they are
            read; texts of configs are left out all the same. Defaults to
            False.
    """
    from mmengine.fileio import PickleHandler, YamlHandler, register_handler
    from mmengine.logging import print_log
    from mmengine.runner import CheckpointLoader

    from lors_plugin.checkpoints import files, for_host, plain_data

    register_safe_globals()
    files.set_torch_policy(trust)
    host_load = CheckpointLoader.load_checkpoint
    host_load = getattr(host_load, 'by_host', host_load)

    def load_checkpoint(cls, filename, map_location=None, logger='current'):
        if '://' in str(filename):
            content = host_load(filename, map_location, logger)
        else:
            print_log(f'Loads the checkpoint {filename}', logger=logger)
            content = files.load_checkpoint_file(
                os.path.expanduser(filename), trust, map_location or 'cpu'
            )
        return for_host.content_for_host(content, filename)

    load_checkpoint.by_host = host_load
    CheckpointLoader.load_checkpoint = classmethod(load_checkpoint)

    pickles = PickleHandler if trust else plain_data.PlainPickleHandler
    yaml = YamlHandler if trust else plain_data.PlainYamlHandler
    register_handler(['pkl', 'pickle'])(pickles)
    register_handler(['yaml', 'yml'])(yaml)
