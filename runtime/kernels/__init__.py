"""Backends of the forward pass. `get_kernels` chooses one; `Kernels` says what each offers."""

from .base import Kernels as Kernels
from .base import Linear as Linear
from .select import BACKENDS as BACKENDS
from .select import check_threads as check_threads
from .select import get_kernels as get_kernels
