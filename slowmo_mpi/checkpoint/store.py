"""Writing beside the training, and finding the newest whole checkpoint to go on from."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..comm import Communicator, Endpoint
from ..errors import SlowmoError, UsageError
from . import hdf5
from .read import Checkpoint, resolve
from .seal import FORMAT
from .tree import Packed, Vector, to_stored
from .write import together, write

WRITER_TIMEOUT_S = 3600.0  # for the other ranks' disks: one may be far slower than ours


class Store:
    """Writes checkpoints on all ranks together, beside the training or in its way.

    layout: "parallel" (one file, written through MPI-IO), "shards" (a file per rank, and one that shows them as
    one), or "auto": parallel where h5py can. asynchronous: copy the state, and write the copy in a thread on a
    communicator of its own while training goes on; where MPI does not allow threads it is synchronous. `chosen`
    says what came of it.
    Raises: UsageError where the layout cannot be had.
    """

    def __init__(self, comm: Endpoint, layout: str = "auto", asynchronous: bool = True):
        self.comm = comm.duplicate(WRITER_TIMEOUT_S)
        real = isinstance(comm, Communicator)
        able = real and hdf5.writes_together()
        able = all(self.comm.gather(able))
        why = "" if able else ": h5py is serial" if real else ": simulated ranks"
        if layout == "parallel" and not able:
            raise UsageError(
                f'checkpoint.layout = "parallel" cannot be had{why}.',
                "Type --set checkpoint.layout=auto, or have bin/setup build h5py for parallel HDF5.",
            )
        self.parallel = able and layout != "shards"
        self.layout = "parallel" if self.parallel else "shards"
        self.asynchronous = asynchronous and self.comm.allows_threads
        file = "one file, parallel HDF5" if self.parallel else f"a file per rank{why if layout == 'auto' else ''}"
        late = "" if self.asynchronous or not asynchronous or not real else ": MPI does not allow threads"
        self.chosen = f"{file}, {'asynchronous' if self.asynchronous else f'synchronous{late}'}"
        self._memory: dict[str, tuple[Any, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self, path: Path, packed: Packed, attributes: dict[str, Any], tables: dict[str, Any],
        then: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Write `path` from a state as it is now. Waits for the checkpoint before: one at a time.

        attributes, tables: see `write`. then: run on rank 0 once the file is there.
        Asynchronous: returns once the state is copied; what goes wrong is raised by the next `save`, `poll` or `wait`.
        """
        self.wait()
        host = self._copy(packed)

        def work() -> None:
            write(path, packed, host, attributes, tables, self.comm, self.parallel)
            if self.comm.rank == 0:
                then()

        if not self.asynchronous:
            work()
            return

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = error

        for vector in packed.vectors.values():
            vector.parts = []  # the copy is what is written; the tensors go on
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> bool:
        """Whether nothing is being written. Raises what went wrong since."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        return self._thread is None

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()  # each of its own waits is bounded
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _copy(self, packed: Packed) -> dict[str, Tensor]:
        """The vectors, on the host and as HDF5 knows them; in memory that is used again, since fresh pages are slow."""
        host: dict[str, Tensor] = {}
        for name, vector in packed.vectors.items():
            whole = None if self.asynchronous else vector.whole()
            host[name] = to_stored(self._buffer(name, vector) if whole is None else whole)
        if self.comm.device.type == "cuda":
            torch.cuda.synchronize(self.comm.device)
        return host

    def _buffer(self, name: str, vector: Vector) -> Tensor:
        shape = (vector.numel, vector.dtype, [(start, t.shape) for start, t, _ in vector.parts])
        kept, buffer = self._memory.get(name, (None, None))
        if buffer is None or kept != shape:
            pinned = self.comm.device.type == "cuda"
            buffer = torch.zeros(vector.numel, dtype=vector.dtype, pin_memory=pinned)
            self._memory[name] = shape, buffer
        vector.copy_to(buffer)
        return buffer


def newest(place: Path, comm: Endpoint, note: Callable[[str], None] = lambda text: None) -> Checkpoint:
    """The newest whole checkpoint of a run folder, or the one that `place` is; every byte of it proved, by all ranks.

    note: told on rank 0 of each that is passed over. Raises: SlowmoError on all ranks where there is none.
    """
    paths = together(comm, lambda: resolve(place), only=0)[0]
    faults = []
    for path in paths:
        checkpoint, fault = None, ""
        try:
            checkpoint = Checkpoint(path)
            checkpoint.prove(comm.rank, comm.size)
        except SlowmoError as error:
            fault = error.message
        fault = next(filter(None, comm.gather(fault)), "")
        if not fault and checkpoint is not None:
            return checkpoint
        if checkpoint is not None:
            checkpoint.close()
        faults.append(fault)
        if comm.rank == 0 and len(paths) > 1:
            note(f"{fault} Trying the one before.")
    hint = "Give another checkpoint." if len(paths) == 1 else "Start a new run, without --resume."
    raise SlowmoError(faults[0] if len(paths) == 1 else f"No checkpoint in {place} is whole. {faults[0]}", hint)


def attributes_of(step: int, round: int, ranks: int, layout: str, config: str) -> dict[str, Any]:
    """The root's attributes, the same for all checkpoints."""
    h5py = hdf5.load()
    versions = {
        "slowmo-mpi": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version,
    }  # fmt: skip
    return {
        "format": FORMAT, "step": step, "round": round, "ranks": ranks, "layout": layout, "config": config,
        "versions": json.dumps(versions), "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
