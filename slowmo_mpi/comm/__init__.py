"""Communication: `Communicator` over MPI (the only place that imports mpi4py), and its twin `simulate`.

Names are imported when first used: `comm.launcher` is asked before torch is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import Endpoint, Operation
    from .mpi import Communicator
    from .simulated import simulate

__all__ = ["Communicator", "Endpoint", "Operation", "simulate"]

_HOME = {"Communicator": "mpi", "Endpoint": "core", "Operation": "core", "simulate": "simulated"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slowmo_mpi.comm' has no attribute {name!r}")
    return getattr(import_module(f"slowmo_mpi.comm.{_HOME[name]}"), name)
