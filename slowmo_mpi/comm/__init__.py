"""Communication: `Communicator` over MPI (the only place that imports mpi4py), and its twin `simulate`."""

from .core import Endpoint, Exchange
from .mpi import Communicator
from .simulated import simulate

__all__ = ["Communicator", "Endpoint", "Exchange", "simulate"]
