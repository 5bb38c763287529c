"""How tensors get to MPI: as they are, or in chunks through host memory; never before the kernels that make them.

MPI knows nothing of CUDA's streams. A message about GPU memory is therefore posted late: once the kernels that the
caller had queued are through, which every poll asks and none waits for. The caller's stream is the one that is
current where a message is made, and again where it is found done: what is queued there then sees the data.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

STAGE_BYTES = 4 << 20  # of a chunk through host memory; both ends must cut alike
DEPTH = 2  # chunks of one message under way: one is copied while the other is on the wire
KEPT_BYTES = 64 << 20  # of idle host memory
SMALLEST_BYTES = 4096  # host memory comes in powers of two from here


# ---- what there is to wait for ----
class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether all before it is through."""


class Device(Protocol):
    """What a message needs of the place where its tensor lives."""

    def mark(self) -> Event:
        """The point that the caller's stream has reached."""

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        """Begin a copy of bytes between host and device, aside from the caller's stream; its end."""

    def wait(self, event: Event) -> None:
        """Let what the caller queues from now on come after the event; does not block the host."""

    def memory(self, size_bytes: int) -> Tensor:
        """Fresh host memory that copies can be made from and to, as bytes."""


class _Past:
    def query(self) -> bool:
        return True


PAST = _Past()


class Host:
    """CPU memory, which needs none of this: staged all the same for tests."""

    def mark(self) -> Event:
        return PAST

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        with torch.inference_mode():  # in which tensors may be written that were, and that were not, made in it
            target.copy_(source)
        return PAST

    def wait(self, event: Event) -> None:
        pass

    def memory(self, size_bytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(size_bytes, dtype=torch.uint8)


class Cuda:
    """A GPU: copies run on two streams of their own, one each way, as the hardware has an engine for each."""

    def __init__(self, device: torch.device):
        self._device = device
        self._outward, self._inward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Event:
        stream = self._inward if target.is_cuda else self._outward
        stream.wait_event(after)
        with torch.cuda.stream(stream), torch.inference_mode():
            target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def memory(self, size_bytes: int) -> Tensor:
        # On this device: pinning starts a context on the thread's current one.
        with torch.cuda.device(self._device), torch.inference_mode(False):
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)


class Pool:
    """Host memory for one device's chunks, used again: to pin pages costs more than to copy them.

    Never waits, so that no two messages can wait for each other's memory; what is out is bounded by DEPTH chunks
    per message, what lies idle by KEPT_BYTES.
    """

    def __init__(self, device: Device):
        self.device = device
        self.idle_bytes = 0
        self._idle: defaultdict[int, deque[tuple[Tensor, Event]]] = defaultdict(deque)

    def take(self, size_bytes: int) -> Tensor:
        """At least so many bytes, which no copy is using any more."""
        room = max(SMALLEST_BYTES, 1 << (size_bytes - 1).bit_length())
        idle = self._idle[room]
        if not idle or not idle[0][1].query():
            return self.device.memory(room)
        self.idle_bytes -= room
        return idle.popleft()[0]

    def give(self, memory: Tensor, after: Event) -> None:
        """Take it back, to be used again after the event."""
        if self.idle_bytes + memory.numel() <= KEPT_BYTES:
            self.idle_bytes += memory.numel()
            self._idle[memory.numel()].append((memory, after))


# ---- messages: each knows when it is done, and keeps its memory until then ----
Post = Callable[[Tensor], Any]
"""Hands memory to MPI, as a send or a receive; the request, of which `Test()` is asked."""


class Message:
    """A message that MPI has had from the start."""

    __slots__ = ("_memory", "_request", "done")

    def __init__(self, memory: Any, request: Any):
        self._memory, self._request = memory, request
        self.done = False

    def test(self) -> bool:
        """Whether it is through; once it is, `done`."""
        self.done = self._request.Test()
        return self.done


class Late:
    """A message that MPI gets piece by piece, as kernels and copies end.

    key: MPI tells messages with the same key apart by their order alone, so they must be posted in order.
    posted: MPI has all of it; through: nothing is left to be done about it on the host; done: and this was told.
    """

    def __init__(self, pool: Pool, payload: Tensor, post: Post, key: Hashable, stage_bytes: int):
        self.key = key
        self.posted = self.through = self.done = False
        self._pool, self._post = pool, post
        self._after = pool.device.mark()
        self._left = deque(payload.detach().view(-1).view(torch.uint8).split(stage_bytes))
        self._landed: Event | None = None

    def advance(self, may_post: bool) -> None:
        """Do what can be done now."""
        raise NotImplementedError

    def test(self) -> bool:
        """Whether it is through; then the caller's stream waits for the last copy, and the message is `done`."""
        if self.through and not self.done:
            if self._landed is not None:
                self._pool.device.wait(self._landed)
            self.done = True
        return self.done


class Direct(Late):
    """A send from, or a receive into, the memory itself: posted when no kernel queued before is using it."""

    def __init__(self, pool: Pool, payload: Tensor, post: Post, key: Hashable, stage_bytes: int = 0):
        super().__init__(pool, payload, post, key, max(1, payload.nbytes))
        self._request: Any = None

    def advance(self, may_post: bool) -> None:
        if not self.posted and may_post and self._after.query():
            self._request, self.posted = self._post(self._left[0]), True
        self.through = self.posted and (self.through or self._request.Test())


class StagedSend(Late):
    """Chunk by chunk: copied to host memory, and from there sent when the copy has ended."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._copied: deque[tuple[Tensor, int, Event]] = deque()
        self._flying: deque[tuple[Tensor, Any]] = deque()

    def advance(self, may_post: bool) -> None:
        while self._flying and self._flying[0][1].Test():
            self._pool.give(self._flying.popleft()[0], PAST)
        while self._left and len(self._copied) + len(self._flying) < DEPTH:
            chunk = self._left.popleft()
            memory = self._pool.take(chunk.numel())
            copied = self._pool.device.copy(memory[: chunk.numel()], chunk, self._after)
            self._copied.append((memory, chunk.numel(), copied))
        while may_post and self._copied and self._copied[0][2].query():
            memory, size, _ = self._copied.popleft()
            self._flying.append((memory, self._post(memory[:size])))
        self.posted = not self._left and not self._copied
        self.through = self.posted and not self._flying


class StagedReceive(Late):
    """Chunk by chunk: received in host memory, and from there copied, aside, to where it belongs."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._flying: deque[tuple[Tensor, Tensor, Any]] = deque()

    def advance(self, may_post: bool) -> None:
        while self._flying and self._flying[0][2].Test():
            memory, chunk, _ = self._flying.popleft()
            self._landed = self._pool.device.copy(chunk, memory[: chunk.numel()], self._after)
            self._pool.give(memory, self._landed)
        while may_post and self._left and len(self._flying) < DEPTH:
            chunk = self._left.popleft()
            memory = self._pool.take(chunk.numel())
            self._flying.append((memory, chunk, self._post(memory[: chunk.numel()])))
        self.posted = not self._left
        self.through = self.posted and not self._flying


class Flight:
    """All messages of this rank that are under way. One thread at a time."""

    def __init__(self) -> None:
        self._kept: set[Message | Late] = set()  # MPI and the copies may still use their memory
        self._late: dict[Late, None] = {}  # those to be moved on, oldest first
        self._pools: dict[torch.device, Pool] = {}

    def pool(self, device: torch.device) -> Pool:
        """The host memory for tensors of this device."""
        if device not in self._pools:
            self._pools[device] = Pool(Host() if device.type == "cpu" else Cuda(device))
        return self._pools[device]

    def add(self, message: Message) -> Message:
        """Keep a message that is posted."""
        self._kept.add(message)
        return message

    def add_late(self, message: Late) -> Late:
        """Keep a message, and do of it what can be done now."""
        self._kept.add(message)
        self._late[message] = None
        self._advance()
        return message

    def done(self, messages: Sequence[Message | Late]) -> bool:
        """Whether all of these are done. Moves on all messages, not only these: others wait for the rest."""
        if self._late:
            self._advance()
        for message in messages:
            if not message.done:
                if not message.test():
                    return False
                self._kept.discard(message)
        return True

    def finish(self, timeout_s: float) -> None:
        """Let messages that nobody waits for arrive, within reason."""
        deadline = time.perf_counter() + timeout_s
        while self._kept and time.perf_counter() < deadline:
            for message in tuple(self._kept):
                self.done([message])
            time.sleep(1e-4)

    def _advance(self) -> None:
        blocked = set()
        for message in tuple(self._late):
            message.advance(message.key not in blocked)
            if message.through:
                del self._late[message]
            elif not message.posted:
                blocked.add(message.key)


def claims_cuda(library: Any, version: str, environment: Mapping[str, str] = os.environ) -> bool | None:
    """Whether MPI says that it takes CUDA memory; None where it does not say.

    library: the MPI library, or what is linked to it, opened by ctypes.
    """
    if "CRAY MPICH" in version.upper():  # it has the code, and uses it only when told to
        return environment.get("MPICH_GPU_SUPPORT_ENABLED") == "1"
    if (mpich := getattr(library, "MPIX_GPU_query_support", None)) is not None:
        found = ctypes.c_int(0)
        return mpich(0, ctypes.byref(found)) == 0 and bool(found.value)  # 0: MPIX_GPU_SUPPORT_CUDA, and MPI_SUCCESS
    if (openmpi := getattr(library, "MPIX_Query_cuda_support", None)) is not None:
        return bool(openmpi() == 1)
    return None
