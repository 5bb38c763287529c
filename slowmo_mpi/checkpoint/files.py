"""Files on the disk: the beginning of one as HDF5 wants it, writing, syncing, reserving room, all with plain errors."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

WRITE_BYTES = 1 << 29  # of one call: some take 2 GiB at most, and some MPI-IOs count in 32 bits


class Beginning:
    """A file as HDF5 wants it, the slabs still missing: what it writes is kept here, and then stored by us.

    HDF5 1.10 crashes where closing a file fails, which is how it meets a full disk or a quota.
    """

    def __init__(self) -> None:
        self._writes: list[tuple[int, bytes]] = []
        self._position = self._size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._writes.append((self._position, bytes(data)))
        self._position += len(self._writes[-1][1])
        self._size = max(self._size, self._position)
        return len(self._writes[-1][1])

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        for offset, data in self._writes:
            start, stop = max(offset, self._position), min(offset + len(data), self._position + len(view))
            if start < stop:
                view[start - self._position : stop - self._position] = data[start - offset : stop - offset]
        self._position += len(view)
        return len(view)

    def truncate(self, size: int) -> int:
        self._size = size
        return size

    def flush(self) -> None:
        pass

    def store(self, path: Path) -> None:
        """Put it into a new file, for the whole of which the disk reserves room: if there is none, we hear it now."""
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
            reserve(fd, self._size)
            for offset, data in self._writes:
                write_at(fd, data, offset)


def reserve(fd: int, size: int) -> None:
    """Have the disk set room aside for a file. Raises: OSError where there is none.

    Not os.posix_fallocate: where a file system cannot reserve, that writes into every block instead.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(size)):
        fault = ctypes.get_errno()
        if fault not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(fault, os.strerror(fault))
        os.truncate(fd, size)


class Syncing:
    """The disk works on what is in the file so far, in a thread, while we write on; at the end all of it is there."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDONLY)
        self._thread = ThreadPoolExecutor(1, "sync")
        self._begun: Future[None] | None = None

    def begin(self) -> None:
        """Start on what is there now, unless the disk is still at it."""
        if self._begun is None or self._begun.done():
            self._wait()
            self._begun = self._thread.submit(os.fsync, self._fd)

    def _wait(self) -> None:
        if self._begun is not None:
            self._begun.result()

    def __enter__(self) -> Syncing:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._wait()
            os.fsync(self._fd)
        finally:
            self._thread.shutdown()
            os.close(self._fd)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file's descriptor, closed afterwards; what fails in between is told with the file's name."""
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(fd)


def write_at(fd: int, data: Any, offset: int) -> None:
    """All of `data`, which has a buffer of bytes, into an open file; one call takes 2 GiB at most."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[:WRITE_BYTES], offset)
        view, offset = view[written:], offset + written


def sync(path: Path) -> None:
    """Have a file's data, or a folder's names, on the disk."""
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)
