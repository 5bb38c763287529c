"""From a JPEG's bytes to the pixels that are trained on; run as a script, a process that does so for a rank.

That process imports neither torch nor MPI nor the rest of this package: it starts in a tenth of a second. It gets
tasks from a socket that it shares with its siblings, writes pixels into memory that it shares with its rank, and ends
when the rank closes the socket, however the rank ends.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import random
import socket
import struct
import sys
from typing import NamedTuple

import xxhash
from PIL import Image

LARGEST_SHARE, LEAST_SHARE = 1.0, 0.08  # of an image's area, in a random crop
LEAST_RATIO = 3 / 4  # of a crop's sides
TRIES = 10  # to fit such a crop into an image
MARGIN = 256 / 224  # what is cut off for testing: the shorter side over the side of the centre crop
CENTRE = -1  # the epoch of a centre crop

_HEAD = struct.Struct("<IiQQQQ")
_SLOT = struct.Struct("<I")
MESSAGE_BYTES = 8192


class Task(NamedTuple):
    """One image to decode. epoch: CENTRE, or what the random crop depends on, with `sample` and the run's seed.

    offset, size: where in `file` it lies; size 0: all of it. checksum: xxh3_64 of its bytes; 0: not known.
    slot: where in the shared memory its pixels go.
    """

    slot: int
    epoch: int
    sample: int
    offset: int
    size: int
    checksum: int
    file: bytes

    def pack(self) -> bytes:
        return _HEAD.pack(*self[:-1]) + self.file

    @staticmethod
    def unpack(message: bytes) -> Task:
        slot, epoch, sample, offset, size, checksum = _HEAD.unpack_from(message)
        return Task(slot, epoch, sample, offset, size, checksum, message[_HEAD.size :])


class Reply(NamedTuple):
    """fault: why the image could not be decoded, or ""."""

    slot: int
    fault: str

    def pack(self) -> bytes:
        return _SLOT.pack(self.slot) + self.fault.encode(errors="replace")[:1000]

    @staticmethod
    def unpack(message: bytes) -> Reply:
        return Reply(_SLOT.unpack_from(message)[0], message[_SLOT.size :].decode(errors="replace"))


class Decoder:
    """Decodes tasks into `memory`, slot by slot of 3 side^2 bytes: (side, side, 3), red, green, blue."""

    def __init__(self, memory: mmap.mmap | bytearray, side: int, seed: int):
        self._memory, self._side, self._seed = memory, side, seed
        self._file, self._fd = b"", -1  # the one read last: a packed file stays open

    def do(self, task: Task) -> Reply:
        """Read, decode, crop, and store one image."""
        try:
            pixels = self._pixels(task)
        except Exception as error:  # whatever Pillow makes of a damaged file
            return Reply(task.slot, reason(error))
        start = task.slot * len(pixels)
        self._memory[start : start + len(pixels)] = pixels
        return Reply(task.slot, "")

    def close(self) -> None:
        """Close the file that is open."""
        if self._fd >= 0:
            os.close(self._fd)
        self._file, self._fd = b"", -1

    def _pixels(self, task: Task) -> bytes:
        data = self._read(task)
        if task.checksum and xxhash.xxh3_64_intdigest(data) != task.checksum:
            raise ValueError("its bytes are not those that were packed")
        with Image.open(io.BytesIO(data)) as image:
            if task.epoch == CENTRE:
                return centre(image, self._side)
            return crop(image, self._side, random.Random(key(self._seed, task.epoch, task.sample)))

    def _read(self, task: Task) -> bytes:
        if not task.size:
            with open(task.file, "rb") as file:
                return file.read()
        if task.file != self._file:
            self.close()
            self._fd, self._file = os.open(task.file, os.O_RDONLY | os.O_CLOEXEC), task.file
        data = os.pread(self._fd, task.size, task.offset)
        if len(data) < task.size:
            raise ValueError("the file ends before it")
        return data


def key(seed: int, epoch: int, sample: int) -> int:
    """One number for the three, none like another's."""
    return (seed << 96) | (epoch << 64) | sample


def crop(image: Image.Image, side: int, chance: random.Random) -> bytes:
    """A random part of the image, resized to side x side, and half of the time mirrored.

    Its share of the area is uniform in [0.08, 1], the ratio of its sides log-uniform in [3/4, 4/3] (Szegedy et al.,
    CVPR 2015); where none of ten tries fits, it is the centre, as far from square as those ratios allow.
    """
    width, height = image.size
    for _ in range(TRIES):
        area = width * height * chance.uniform(LEAST_SHARE, LARGEST_SHARE)
        ratio = math.exp(chance.uniform(math.log(LEAST_RATIO), -math.log(LEAST_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = chance.randint(0, width - w), chance.randint(0, height - h)
            break
    else:
        w, h = min(width, max(1, round(height / LEAST_RATIO))), min(height, max(1, round(width / LEAST_RATIO)))
        left, top = (width - w) // 2, (height - h) // 2
    part = _resized(image, side, (left, top, left + w, top + h))
    return (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else part).tobytes()


def centre(image: Image.Image, side: int) -> bytes:
    """The centre square of an image whose shorter side were side * 256/224, at side x side."""
    half = min(image.size) / MARGIN / 2
    x, y = image.width / 2, image.height / 2
    return _resized(image, side, (x - half, y - half, x + half, y + half)).tobytes()


def check(data: bytes) -> str:
    """What is wrong with an image, or "". All of it is decoded, where the format allows at an eighth of the size."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except Exception as error:  # whatever Pillow makes of it
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """One line on why an image cannot be read."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    if "cannot identify image file" in text:
        return "no image"
    return " ".join(text.split())


def _resized(image: Image.Image, side: int, box: tuple[float, float, float, float]) -> Image.Image:
    # Colours first: a resized palette, or CMYK, is something else.
    return image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=box)


def serve(socket_fd: int, memory_fd: int, side: int, seed: int) -> None:
    """Do tasks until the rank hangs up. Whoever is free takes the next."""
    connection = socket.socket(fileno=socket_fd)
    with mmap.mmap(memory_fd, 0) as memory:
        decoder = Decoder(memory, side, seed)
        try:
            while message := connection.recv(MESSAGE_BYTES):
                connection.send(decoder.do(Task.unpack(message)).pack())
        except OSError:  # the rank has closed its end, or is gone
            pass
        decoder.close()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
