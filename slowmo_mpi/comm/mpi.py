"""The communicator over MPI, which starts when one is made (see also launcher.py)."""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SlowmoError, UsageError
from .core import Endpoint, Gathering
from .launcher import check_world, launched, load_mpi
from .placement import Place, check_devices, ranges, warnings
from .transport import STAGE_BYTES, Direct, Flight, Late, Message, StagedReceive, StagedSend, claims_cuda

SPIN_S = 2e-4  # a wait this short is spent polling; a longer one gives the core away
SLEEP_S = 5e-5
FINISH_S = 5.0
PROOF_S = 30.0
MOST_ELEMENTS = (1 << 31) - 1  # MPI's counts before MPI 4
TRANSPORTS = ("auto", "direct", "staged")


class Communicator(Endpoint):
    """This rank among all of MPI's (a duplicate of COMM_WORLD, or of `mpi_comm`).

    device: where the tensors live; default: the GPU of this local rank, else the CPU.
    timeout: seconds after which a wait is an error that names rank, peer, step and operation.
    transport: how CUDA tensors travel: "staged" in chunks of `stage_bytes` through pinned host memory, with any MPI;
    "direct" as they are, with an MPI that takes CUDA memory; "auto": direct where MPI says that it does and an
    exchange proves it. CPU tensors travel as they are, or staged where device is the CPU and it says so (for tests).
    Afterwards `transport` is what was chosen, `transport_reason` why, `places` where every rank is,
    `warnings` what the user should know of that (on rank 0).
    An exception that nothing catches on one rank ends the whole job: the others would wait for that rank.
    Raises: SlowmoError where MPI cannot start, or where the launcher started more ranks than MPI joined, or where
    "direct" does not work.
    """

    def __init__(
        self,
        mpi_comm: Any = None,
        *,
        timeout: float = 300.0,
        device: torch.device | str | None = None,
        transport: str = "auto",
    ):
        super().__init__(timeout)
        if transport not in TRANSPORTS:
            raise UsageError(f"There is no transport {transport!r}.", f"It is one of: {', '.join(TRANSPORTS)}.")
        self._MPI = MPI = load_mpi()
        world = mpi_comm if mpi_comm is not None else MPI.COMM_WORLD
        self.host = socket.gethostname()
        if mpi_comm is None:
            check_world(launched(), world.Get_size(), library_version())
        self._mpi = world.Dup()
        self.rank, self.size = self._mpi.Get_rank(), self._mpi.Get_size()
        local = self._mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        leader = local.Get_group().Translate_ranks([0], self._mpi.Get_group())[0]
        local.Free()
        whole = device is None or torch.device(device).type == "cuda"  # else a part, or a test's
        if device is None:
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            device = f"cuda:{self.local_rank % gpus}" if gpus else "cpu"
        self.device = torch.device(device)
        self.stage_bytes = STAGE_BYTES
        self.warnings: list[str] = []
        self._flight = Flight()
        self._address = MPI.buffer.fromaddress  # costs a tenth of a view through numpy
        self._plain = self._direct = False  # CPU tensors, and all others, go as they are
        atexit.register(self._flight.finish, FINISH_S)
        if self.size > 1:
            sys.excepthook = self._end_the_job
        self.places = self._find_places(leader) if whole else []
        check_devices(self.places)
        if self.rank == 0:
            self.warnings = warnings(self.places, os.cpu_count() or 1)
        if self.device.type == "cpu":
            self._plain = transport != "staged"
            self.transport = "direct" if self._plain else "staged"
            self.transport_reason = "the tensors live in host memory" if self._plain else "it was asked for"
        else:
            torch.cuda.set_device(self.device)  # else every rank opens a context on the first GPU
            self._plain = True
            self.transport, self.transport_reason = self._choose(transport, says_cuda())
            self._direct = self.transport == "direct"
            self.stream = torch.cuda.Stream(self.device, priority=-1)

    def _isend(self, payload: Tensor, peer: int, tag: int) -> Message | Late:
        if payload.is_cpu and self._plain:
            return self._flight.add(Message(payload, self._mpi.Isend(self._buffer(payload), peer, tag)))
        return self._post_late(StagedSend, self._mpi.Isend, payload, peer, tag)

    def _irecv(self, payload: Tensor, peer: int, tag: int) -> Message | Late:
        if payload.is_cpu and self._plain:
            return self._flight.add(Message(payload, self._mpi.Irecv(self._buffer(payload), peer, tag)))
        return self._post_late(StagedReceive, self._mpi.Irecv, payload, peer, tag)

    def _post_late(self, staged: type[Late], call: Callable[..., Any], payload: Tensor, peer: int, tag: int) -> Late:
        kind, key = Direct if self._direct else staged, (self, staged, peer, tag)
        pool, post = self._flight.pool(payload.device), lambda memory: call(self._buffer(memory), peer, tag)
        return self._flight.add_late(kind(pool, payload, post, key, self.stage_bytes))

    def _buffer(self, memory: Tensor) -> list[Any]:
        """The memory as bytes: MPI's own half-precision types are not to be trusted."""
        if not memory.is_contiguous():
            raise ValueError("a tensor that is sent or received must be contiguous")
        return [self._address(memory.data_ptr(), memory.nbytes), self._MPI.BYTE]

    def _done(self, requests: Sequence[Message | Late]) -> bool:
        try:
            return self._flight.done(requests)
        except self._MPI.Exception as error:
            raise SlowmoError(
                f"MPI failed on rank {self.rank} at step {self._whole.step}: {error}.",
                "A rank is dead or out of step: did all call worker.step() equally often?",
            ) from None

    def _pause(self, waiting_s: float) -> bool:
        # Ranks may outnumber cores: yield first, then sleep, so that a waiting rank does not burn a core.
        if waiting_s < SPIN_S:
            os.sched_yield()
        else:
            time.sleep(SLEEP_S)
        return True

    def gather_later(self, mine: bytes) -> Gathering:
        everybody = bytearray(len(mine) * self.size)
        with self.lock:
            request = self._mpi.Iallgather([mine, self._MPI.BYTE], [everybody, self._MPI.BYTE])
            message = self._flight.add(Message((mine, everybody), request))

        def collect() -> list[bytes]:
            return [bytes(everybody[i * len(mine) : (i + 1) * len(mine)]) for i in range(self.size)]

        return Gathering(self, [message], collect)

    def _all_reduce_by_mpi(self, x: Tensor) -> list[Message] | None:
        kind = {torch.float32: self._MPI.FLOAT, torch.float64: self._MPI.DOUBLE}.get(x.dtype)
        if kind is None or not (x.is_cpu and self._plain) or x.numel() > MOST_ELEMENTS:
            return None  # on CUDA memory Open MPI's nonblocking sums end in a segmentation fault
        buffer = [self._address(x.data_ptr(), x.nbytes), x.numel(), kind]
        return [self._flight.add(Message(x, self._mpi.Iallreduce(self._MPI.IN_PLACE, buffer)))]

    def abort(self, code: int) -> None:
        self._MPI.COMM_WORLD.Abort(code)

    def duplicate(self, timeout: float) -> Communicator:
        return self._relative(self._mpi, timeout)

    def split(self, color: int) -> Communicator:
        part = self._mpi.Split(color, self.rank)
        group = self._relative(part, self.timeout)
        part.Free()
        # An operation of this communicator may stand on messages of its parts: they are moved on together.
        group.lock, group._under_way, group._flight = self.lock, self._under_way, self._flight
        group.stream = self.stream
        return group

    def _relative(self, mpi_comm: Any, timeout: float) -> Communicator:
        """A communicator for ranks of this one: the same device and transport, of which nothing is left to prove."""
        other = Communicator(mpi_comm, timeout=timeout, device="cpu")
        other.device, other.stage_bytes = self.device, self.stage_bytes
        other.transport, other.transport_reason = self.transport, self.transport_reason
        other._plain, other._direct = self._plain, self._direct
        return other

    @property
    def allows_threads(self) -> bool:
        """Whether several threads may use MPI at a time."""
        return bool(self._MPI.Query_thread() == self._MPI.THREAD_MULTIPLE)

    @property
    def mpi(self) -> Any:
        """The underlying mpi4py communicator, for libraries that want one (parallel HDF5)."""
        return self._mpi

    # ---- CUDA memory ----
    def _choose(self, wanted: str, says: bool | None) -> tuple[str, str]:
        """The transport for CUDA tensors and the reason for it, the same on every rank."""
        library = library_version()
        if wanted == "staged":
            return "staged", "it was asked for"
        if wanted == "auto":
            everybody = self.gather(says)
            if None in everybody:
                return "staged", f"{library} does not say whether it takes CUDA memory"
            if not all(everybody):
                return "staged", f"{library} says that it does not take CUDA memory"
        for length in (1_000, 1_000_000):  # MPI sends small and large messages in different ways
            faults = [fault for fault in self.gather(self._try_direct(length)) if fault]
            if faults and wanted == "direct":
                hint = "Leave the transport at auto, or say staged."
                raise SlowmoError(f"{library} does not take CUDA memory: {faults[0]}.", hint)
            if faults:
                return "staged", f"{library} says that it takes CUDA memory, but {faults[0]}"
        return "direct", f"an exchange proved that {library} takes CUDA memory"

    def _try_direct(self, length: int) -> str:
        """Send GPU memory to the next rank as it is; what went wrong, or nothing."""
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        deadline = time.perf_counter() + min(self.timeout, PROOF_S)
        plain, direct = self._plain, self._direct
        self._plain, self._direct = False, True
        try:
            mine, theirs = (torch.arange(length, device=self.device) + 7 * rank for rank in (self.rank, source))
            got, tag = torch.zeros_like(mine), self._next_tag()
            requests = [self._irecv(got, source, tag), self._isend(mine, to, tag)]
            while not self._done(requests):
                if time.perf_counter() > deadline:
                    return f"a message of {mine.nbytes} bytes did not arrive on rank {self.rank}"
                self._pause(1.0)
            same = torch.equal(got, theirs)
            return "" if same else f"a message of {mine.nbytes} bytes arrived damaged on rank {self.rank}"
        except (SlowmoError, RuntimeError) as error:
            return f"a message failed on rank {self.rank}: {error}"
        finally:
            self._plain, self._direct = plain, direct

    def _find_places(self, leader: int) -> list[Place]:
        """Where every rank is, by rank."""
        claim, gpu, seen = launched(), "", 0
        if self.device.type == "cuda":
            seen = torch.cuda.device_count()
            gpu = str(getattr(torch.cuda.get_device_properties(self.device), "uuid", f"{self.host} {self.device}"))
        node = claim.node if claim is not None and claim.node else self.host
        cores = ranges(os.sched_getaffinity(0))
        return self.gather(Place(self.rank, node, leader, self.local_rank, self.local_size, claim, cores, gpu, seen))

    def _end_the_job(self, *exception: Any) -> None:
        sys.__excepthook__(*exception)
        sys.stderr.flush()
        self.abort(1)


def says_cuda() -> bool | None:
    """Whether MPI says that it takes CUDA memory; None where it does not say."""
    from mpi4py import MPI

    return claims_cuda(ctypes.CDLL(MPI.__file__), library_version())  # MPI itself is not among the global symbols


def library_version() -> str:
    """The MPI library in one line, such as "Open MPI v5.0.11"."""
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(",")[0].split())
