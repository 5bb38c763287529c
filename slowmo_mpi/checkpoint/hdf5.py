"""h5py, loaded so that neither MPI is started nor the wrong one found."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from ..comm.launcher import load_mpi
from ..errors import SlowmoError


def load() -> Any:
    """h5py. A parallel build needs mpi4py's MPI loaded first; a command on a login node must not start it."""
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # not every parallel file system has locks; names do
    with contextlib.suppress(SlowmoError):  # a serial h5py does without
        load_mpi(start=False)
    import h5py

    return h5py


def writes_together() -> bool:
    """Whether this h5py can write one file from many ranks."""
    return bool(load().get_config().mpi)
