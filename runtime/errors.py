"""What can go wrong while running a model; files have their own classes in `formats.errors`."""

from __future__ import annotations


class ConfigError(ValueError):
    """A hyperparameter in the file is missing, of a wrong type, or not one that this runtime can run."""


class BackendError(ValueError):
    """The backend that was asked for cannot be had."""


class KernelDiffers(BackendError):
    """A kernel gives other results than the reference on this machine."""


class CacheError(ValueError):
    """The KV ring does not hold what was asked of it."""


class LogitsError(FloatingPointError):
    """The model's scores are no numbers that a token could be chosen by."""
