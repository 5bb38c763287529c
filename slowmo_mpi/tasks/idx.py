"""Reader of IDX files, the format of MNIST and its kin: strict, bounded in memory, plain or gzip."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from slowmo_mpi.errors import SlowmoError

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMENSIONS = 32  # numpy 1's limit
CHUNK_BYTES = 2**20

Stream = IO[bytes] | gzip.GzipFile


def read(path: str | os.PathLike[str], *, dtype: str = "", dimensions: int = 0, hint: str = "") -> np.ndarray:
    """The array in an IDX file, in native byte order.

    The file is: two zero bytes, the type's code, the number of dimensions, each dimension as a big-endian
    uint32, then exactly the items those promise, big-endian; all of it gzipped or not, which the first two
    bytes tell. `dtype` (a numpy name such as "uint8") and `dimensions`, where given, must agree. Memory is
    bounded by what the file really holds, not by what its header promises.
    Raises SlowmoError that names the file, what was expected and what was found, and ends with `hint`.
    """
    file = Path(path)
    hint = hint or f"Fetch {file.name} again from where it came."
    try:
        with open(file, "rb") as raw:
            if raw.peek(2)[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    return _parse(unzipped, file, dtype, dimensions, hint)
            return _parse(raw, file, dtype, dimensions, hint)
    except FileNotFoundError:
        raise SlowmoError(f"There is no file {file}.", hint) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SlowmoError(f"{file} is a damaged gzip file: {error}.", hint) from error
    except OSError as error:
        raise SlowmoError(f"{file} cannot be read: {error.strerror or error}.", hint) from error


def _parse(stream: Stream, file: Path, dtype: str, dimensions: int, hint: str) -> np.ndarray:
    def refuse(message: str) -> NoReturn:
        raise SlowmoError(f"{file} {message}.", hint)

    magic = bytes(_up_to(stream, 4))
    if not magic:
        refuse("is empty, where an IDX header of at least 8 bytes was expected")
    if magic[:2] != b"\0\0"[: len(magic)]:
        refuse(f"is no IDX file: it begins with {magic.hex(' ')}, where 00 00 was expected")
    if len(magic) < 4:
        refuse(f"is cut short: {len(magic)} bytes, where an IDX header of at least 8 was expected")
    code, count = magic[2], magic[3]
    if code not in DTYPES:
        known = ", ".join(f"{known:02x}" for known in DTYPES)
        refuse(f"has the type code {code:02x}, where one of {known} was expected")
    kind = np.dtype(DTYPES[code])
    if dtype and kind.newbyteorder("=") != np.dtype(dtype):
        refuse(f"holds items of type {kind.name}, where {dtype} was expected")
    if dimensions and count != dimensions:
        refuse(f"has {count} dimensions, where {dimensions} were expected")
    if not 1 <= count <= MAX_DIMENSIONS:
        refuse(f"has {count} dimensions, where 1 to {MAX_DIMENSIONS} were expected")

    sizes = _up_to(stream, 4 * count)
    if len(sizes) < 4 * count:
        refuse(f"is cut short: a header of {4 + len(sizes)} bytes, where {4 + 4 * count} were expected")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    expected = math.prod(shape) * kind.itemsize
    promise = f"{' x '.join(map(str, shape))} items of type {kind.name} = {expected} bytes"
    if expected == 0:
        refuse(f"holds no items: its header promises {promise}")
    items = _up_to(stream, expected)
    if len(items) < expected:
        refuse(f"is cut short: {len(items)} bytes of items, where its header promises {promise}")
    if stream.read(1):  # at a gzip file's end this also verifies its checksum
        refuse(f"has bytes left over after the {promise} that its header promises")
    return np.frombuffer(items, kind).astype(kind.newbyteorder("="), copy=False).reshape(shape)


def _up_to(stream: Stream, size: int) -> bytearray:
    """`size` bytes, or what there is: in pieces, so that a false size costs no memory."""
    data = bytearray()
    while len(data) < size and (piece := stream.read(min(CHUNK_BYTES, size - len(data)))):
        data += piece
    return data
