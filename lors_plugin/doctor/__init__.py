"""Check an environment: ``python -m lors_plugin.doctor``."""
