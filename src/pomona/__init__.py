"""Federated and continual LoRA fine-tuning with exact aggregation and a versioned registry.

Importing this package imports no third party; each room imports what it needs.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pomona")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+uninstalled"

__all__ = ["__version__"]
