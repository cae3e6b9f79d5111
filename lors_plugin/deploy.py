"""The former name of :mod:`lors_plugin.export`, for one version."""

import warnings

from lors_plugin.export import *  # noqa: F403

warnings.warn(
    'lors_plugin.deploy is now lors_plugin.export', FutureWarning, stacklevel=2
)
