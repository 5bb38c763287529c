"""Batches of images, decoded ahead of the training by processes that know nothing of MPI.

A process that has started MPI must not be forked: a child would share its registered memory and its connections. The
decoders are therefore fresh Pythons (vfork and exec, which copies nothing), with one socket for tasks and replies, and
one piece of memory for pixels; they never hold the lock that the rank's own Python needs.

An image that cannot be decoded is named, counted, and replaced by the next one of the split that can, so that a batch
is a function of its samples' numbers and the epoch alone. Where nothing is learned the replacement is not counted.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from ..errors import SlowmoError
from . import NOT_COUNTED, decode
from .decode import CENTRE, Decoder, Reply, Task
from .images import Source, broken_limit

AHEAD = 3  # batches under way at a time: the one that is waited for, and two more
SOME_BROKEN = 10  # images, and one in fifty of those seen: so many may be broken by chance where one in a hundred is
STUCK_S = 300.0  # without an image decoded: something is wrong
LOOK_S = 0.5  # between two looks whether all decoders live
END_S = 5.0  # for a decoder to end by itself
# What a launcher or a terminal sends to a rank's whole group is the rank's business: decoders end when it hangs up.
NOT_THEIRS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
log = logging.getLogger(__name__)
Batches = Generator[tuple[Tensor, Tensor], None, None]


class Images:
    """The images of a split as samples: uint8 (b, 3, side, side), channels last in memory, and labels, int64 (b,).

    augment: in `batches` a random crop, half of the time mirrored, which depends on seed, epoch and sample alone;
    else, and in `batch`, the centre. Without it, what stands for a broken image has the label NOT_COUNTED.
    workers: processes that decode; 0: this one does.
    """

    def __init__(self, source: Source, side: int, seed: int, augment: bool, workers: int):
        self.source, self.side, self.seed = source, side, seed
        self.augment, self.workers = augment, workers
        self.broken: set[int] = set()  # samples that could not be decoded
        self._asked = 0  # images, so far

    def __len__(self) -> int:
        return len(self.source.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images of `indices`, int64 (b,), decoded by this process."""
        with closing(self._stream([(CENTRE, indices)], 0)) as one:
            return next(one)

    def batches(self, order: Iterable[tuple[int, Tensor]]) -> Batches:
        """A batch for each (epoch, indices) of `order`, which is read some batches ahead.

        Closing the generator ends the processes. No batch may be more than AHEAD times as large as the first.
        Raises: SlowmoError where too many images are broken, or a process dies or hangs.
        """
        return self._stream(((epoch if self.augment else CENTRE, i) for epoch, i in order), self.workers)

    def _stream(self, order: Iterable[tuple[int, Tensor]], workers: int) -> Batches:
        """The decoders' memory is a ring of slots: number q of all images asked for is in slot q % slots."""
        order = iter(order)
        item = next(order, None)
        if item is None:
            return
        slots = AHEAD * len(item[1])
        samples, epochs = np.zeros(slots, np.int64), np.zeros(slots, np.int64)  # what each slot is for
        labels = np.zeros(slots, np.int64)
        missing: set[int] = set()  # slots
        under_way: deque[list[int]] = deque()  # the slots of each batch
        begun = done = 0  # images
        with closing(_Processes(self, slots, workers) if workers else _Here(self, slots)) as decoders:
            while item is not None or under_way:
                while item is not None and begun + len(item[1]) - done <= slots:
                    mine = [q % slots for q in range(begun, begun + len(item[1]))]
                    epochs[mine], samples[mine] = item[0], item[1].numpy()
                    labels[mine] = self.source.labels[samples[mine]]
                    for slot in mine:
                        decoders.submit(self.source.task(slot, int(epochs[slot]), int(samples[slot])))
                    self._asked += len(mine)
                    missing.update(mine)
                    under_way.append(mine)
                    begun += len(mine)
                    item = next(order, None)
                mine = under_way.popleft()
                while not missing.isdisjoint(mine):
                    slot, fault = decoders.reply()
                    if fault:
                        samples[slot] = self._instead_of(int(samples[slot]), fault)
                        labels[slot] = self.source.labels[samples[slot]] if self.augment else NOT_COUNTED
                        decoders.submit(self.source.task(slot, int(epochs[slot]), int(samples[slot])))
                    else:
                        missing.remove(slot)
                done += len(mine)
                pixels = torch.from_numpy(decoders.pixels[mine]).permute(0, 3, 1, 2)
                yield pixels, torch.from_numpy(labels[mine])

    def _instead_of(self, sample: int, fault: str) -> int:
        """The sample to take for one that is broken. Raises: SlowmoError where too many are."""
        if sample not in self.broken:
            self.broken.add(sample)
            name = self.source.name(sample)
            seen = min(self._asked, len(self))  # one rank of hundreds sees few of them in an epoch
            if len(self.broken) > min(broken_limit(len(self)), SOME_BROKEN + seen // 50):
                raise SlowmoError(
                    f"{len(self.broken)} of {seen} images cannot be decoded, the last one {name}: {fault}.",
                    "Fetch the data again; one in a hundred may be broken.",
                )
            log.warning(f"{name} cannot be decoded ({fault}); the next one takes its place ({len(self.broken)} so far)")
        return (sample + 1) % len(self)


class _Here:
    """Decodes in this process, when asked for a reply. pixels: (slots, side, side, 3)."""

    def __init__(self, images: Images, slots: int):
        memory = bytearray(slots * 3 * images.side**2)
        self.pixels = np.frombuffer(memory, np.uint8).reshape(slots, images.side, images.side, 3)
        self._decoder = Decoder(memory, images.side, images.seed)
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def reply(self) -> Reply:
        return self._decoder.do(self._tasks.popleft())

    def close(self) -> None:
        self._decoder.close()


class _Processes:
    """Processes that decode into shared memory; each takes the next task when it is free, so replies come in any order.

    pixels: (slots, side, side, 3).
    """

    def __init__(self, images: Images, slots: int, workers: int):
        self._tasks: deque[bytes] = deque()  # that the socket has no room for yet
        size = slots * 3 * images.side**2
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps messages whole
        self._socket.setblocking(False)
        self._ready = select.poll()
        self._ready.register(self._socket, select.POLLIN)
        memory = os.memfd_create("images")
        self._processes: list[subprocess.Popen[bytes]] = []
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_THEIRS)  # children inherit it
        try:
            os.ftruncate(memory, size)
            self.pixels = np.frombuffer(mmap.mmap(memory, size), np.uint8)
            self.pixels = self.pixels.reshape(slots, images.side, images.side, 3)
            numbers = theirs.fileno(), memory, images.side, images.seed
            for _ in range(workers):
                command = [sys.executable, "-P", decode.__file__, *map(str, numbers)]
                self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=numbers[:2]))
        except OSError as error:
            self.close()
            raise SlowmoError(
                f"{workers} processes to decode images cannot be started: {error.strerror or error}.",
                "Type --set task.workers=1, or a smaller task.batch_size.",
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            os.close(memory)

    def submit(self, task: Task) -> None:
        self._tasks.append(task.pack())
        self._send()

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # full; a connection's end is told by `reply`
            while self._tasks:
                self._socket.send(self._tasks[0])
                self._tasks.popleft()

    def reply(self) -> Reply:
        """Wait for an image. Raises: SlowmoError where a process has died, or none has answered for long."""
        begun = time.monotonic()
        while True:
            self._look(time.monotonic() - begun)
            self._send()
            if self._ready.poll(1000 * LOOK_S):
                with contextlib.suppress(ConnectionError):
                    if message := self._socket.recv(decode.MESSAGE_BYTES):
                        return Reply.unpack(message)

    def _look(self, waited_s: float) -> None:
        for process in self._processes:
            if (code := process.poll()) is not None:  # costs a microsecond
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise SlowmoError(
                    f"Process {process.pid}, which decodes images, {how}.",
                    "Signal 9 is often the system's answer to too little memory: type --set task.workers=1.",
                )
        if waited_s > STUCK_S:
            raise SlowmoError(
                f"No image was decoded for {waited_s:.0f} s.", "See whether the file system of task.data still answers."
            )

    def close(self) -> None:
        """Hang up, and see the processes end."""
        self._socket.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a file system that is gone
                    process.wait(END_S)
