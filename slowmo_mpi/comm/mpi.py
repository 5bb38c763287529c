"""The communicator over MPI, which starts when one is made (see also launcher.py)."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SlowmoError, UsageError
from .core import Endpoint, Gathering
from .launcher import launched, load_mpi

SPIN_S = 2e-4  # a wait this short is spent polling; a longer one gives the core away
SLEEP_S = 5e-5
FINISH_S = 5.0


@dataclass(eq=False)
class _Request:
    """An MPI request, and the copy to the device that follows a staged receive."""

    mpi: Any
    host: Tensor
    target: Tensor | None = None


class Communicator(Endpoint):
    """This rank among all of MPI's (a duplicate of COMM_WORLD, or of `mpi_comm`).

    device: where the tensors live; default: the GPU of this local rank, else the CPU. CUDA tensors travel
    through pinned host memory, so any MPI will do; with staged=True CPU tensors do so too (for tests).
    timeout: seconds after which a wait is an error that names rank, peer, step and operation.
    An exception that nothing catches on one rank ends the whole job: the others would wait for that rank.
    Raises: SlowmoError where MPI cannot start, or where the launcher started more ranks than MPI joined.
    """

    def __init__(
        self,
        mpi_comm: Any = None,
        *,
        timeout: float = 300.0,
        device: torch.device | str | None = None,
        staged: bool = False,
    ):
        super().__init__(timeout)
        self._MPI = MPI = load_mpi()
        world = mpi_comm if mpi_comm is not None else MPI.COMM_WORLD
        self.host = socket.gethostname()
        if mpi_comm is None:
            _check_launcher(world.Get_size(), library_version())
        self._mpi = world.Dup()
        self.rank, self.size = self._mpi.Get_rank(), self._mpi.Get_size()
        local = self._mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        local.Free()
        if device is None:
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            device = f"cuda:{self.local_rank % gpus}" if gpus else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # else every rank opens a context on the first GPU
        self._staged = staged
        self._posted: set[_Request] = set()  # in flight, with their memory
        atexit.register(self._finish)
        if self.size > 1:
            sys.excepthook = self._end_the_job

    def _isend(self, payload: Tensor, peer: int, tag: int) -> _Request:
        host = self._host_copy(payload) if self._is_staged(payload) else payload.detach()
        request = _Request(self._mpi.Isend(self._buffer(host), dest=peer, tag=tag), host)
        return self._remember(request)

    def _irecv(self, payload: Tensor, peer: int, tag: int) -> _Request:
        staged = self._is_staged(payload)
        host = self._host_like(payload) if staged else payload.detach()
        mpi = self._mpi.Irecv(self._buffer(host), source=peer, tag=tag)
        request = _Request(mpi, host, payload.detach() if staged else None)
        return self._remember(request)

    def _done(self, requests: list[_Request]) -> bool:
        try:
            done = self._MPI.Request.Testall([r.mpi for r in requests])
        except self._MPI.Exception as error:
            raise SlowmoError(
                f"MPI failed on rank {self.rank} at step {self.step}: {error}.",
                "A rank is dead or out of step: did all call worker.step() equally often?",
            ) from None
        if done:
            self._posted.difference_update(requests)
            for r in requests:
                if r.target is not None:
                    r.target.copy_(r.host)
                    r.target = None
        return bool(done)

    def _pause(self, waiting_s: float) -> bool:
        # Ranks may outnumber cores: yield first, then sleep, so that a waiting rank does not burn a core.
        if waiting_s < SPIN_S:
            os.sched_yield()
        else:
            time.sleep(SLEEP_S)
        return True

    def gather_later(self, mine: bytes) -> Gathering:
        everybody = bytearray(len(mine) * self.size)
        request = self._mpi.Iallgather([mine, self._MPI.BYTE], [everybody, self._MPI.BYTE])

        def collect() -> list[bytes]:
            return [bytes(everybody[i * len(mine) : (i + 1) * len(mine)]) for i in range(self.size)]

        return Gathering(self, [_Request(request, torch.empty(0))], collect)

    def abort(self, code: int) -> None:
        self._mpi.Abort(code)

    def duplicate(self, timeout: float) -> Communicator:
        return Communicator(self._mpi, timeout=timeout, device=self.device)

    @property
    def allows_threads(self) -> bool:
        """Whether several threads may use MPI at a time."""
        return bool(self._MPI.Query_thread() == self._MPI.THREAD_MULTIPLE)

    @property
    def mpi(self) -> Any:
        """The underlying mpi4py communicator, for libraries that want one (parallel HDF5)."""
        return self._mpi

    def _is_staged(self, payload: Tensor) -> bool:
        return self._staged or payload.device.type != "cpu"

    def _buffer(self, host: Tensor) -> Any:
        """The memory of a CPU tensor as MPI bytes: MPI's own half-precision types are not to be trusted."""
        return [host.view(-1).view(torch.uint8).numpy(), self._MPI.BYTE]

    def _host_like(self, payload: Tensor) -> Tensor:
        return torch.empty(payload.shape, dtype=payload.dtype, pin_memory=payload.device.type == "cuda")

    def _host_copy(self, payload: Tensor) -> Tensor:
        host = self._host_like(payload)
        host.copy_(payload)  # waits for the kernels that compute the payload
        return host

    def _remember(self, request: _Request) -> _Request:
        self._posted.add(request)
        return request

    def _end_the_job(self, *exception: Any) -> None:
        sys.__excepthook__(*exception)
        sys.stderr.flush()
        self.abort(1)

    def _finish(self) -> None:
        """Before MPI_Finalize: let messages that nobody waited for arrive, within reason."""
        deadline = time.perf_counter() + FINISH_S
        while self._posted and time.perf_counter() < deadline:
            self._posted = {r for r in self._posted if not r.mpi.Test()}
            time.sleep(SLEEP_S)


def library_version() -> str:
    """The MPI library in one line, such as "Open MPI v5.0.11"."""
    from mpi4py import MPI

    return MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(",")[0].strip()


def _check_launcher(size: int, library: str) -> None:
    """Refuse to train N times alone where a launcher has started N ranks that did not find each other."""
    claim = launched()
    if claim is not None and claim.size != size:
        raise UsageError(
            f"{claim.launcher} started {claim.size} processes, but in MPI ({library}) "
            f"{'each is alone' if size == 1 else f'only {size} meet'}: the launcher belongs to another MPI.",
            "Start with the mpirun of that MPI (slowmo train -n N finds it), or with srun --mpi=pmix; "
            "`slowmo doctor` shows both.",
        )
