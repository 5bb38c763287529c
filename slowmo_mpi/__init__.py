"""SlowMo and gossip training of PyTorch models over MPI.

    from slowmo_mpi import SGP, Communicator, SlowMo

Names are imported when first used, so that `import slowmo_mpi` alone costs nothing and the command line's
help needs neither torch nor MPI.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Communicator": "slowmo_mpi.comm",
    "simulate": "slowmo_mpi.comm",
    "AllReduce": "slowmo_mpi.bases",
    "Local": "slowmo_mpi.bases",
    "DPSGD": "slowmo_mpi.bases",
    "SGP": "slowmo_mpi.bases",
    "OSGP": "slowmo_mpi.bases",
    "SlowMo": "slowmo_mpi.worker",
    "Checkpoints": "slowmo_mpi.checkpoints",
    "SlowmoError": "slowmo_mpi.errors",
    "Topology": "slowmo_mpi.topology",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slowmo_mpi' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
