"""Errors, exit codes and configs of the drawing tools."""

import logging
from collections.abc import Callable

# First: it makes mmcv.ops importable.
from lors_plugin.compat import read_safely
from lors_plugin.inference import InferenceError as DrawError

# isort: split
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import init_default_scope

from lors_plugin.config_file import find_config

__all__ = ['DrawError', 'logger', 'read_config', 'run_tool']

logger = logging.getLogger('draw')


def run_tool(work: Callable[..., None], *args: object) -> int:
    """Run a tool; its errors become a message and the exit code 1."""
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        work(*args)
    except (ValueError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0


def read_config(path: str, trust: bool = False) -> Config:
    """Read a config of MMDetection; files are read as ``trust`` says."""
    read_safely(trust)
    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(find_config(path))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return cfg
