"""A damaged IDX file is refused by name; it never crashes the reader or takes its memory."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest

from slowmo_mpi.errors import SlowmoError
from slowmo_mpi.tasks import idx

ITEMS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx_bytes(items, code=0x08):
    header = bytes([0, 0, code, items.ndim]) + struct.pack(f">{items.ndim}I", *items.shape)
    return header + items.astype(items.dtype.newbyteorder(">")).tobytes()


def read(tmp_path, content, **expected):
    file = tmp_path / "some-images-idx3-ubyte"
    file.write_bytes(content)
    return idx.read(file, **expected)


def refusal(tmp_path, content, **expected):
    with pytest.raises(SlowmoError) as error:
        read(tmp_path, content, **expected)
    assert "some-images-idx3-ubyte" in error.value.message and error.value.hint
    return error.value.message


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, "uint8"), (0x09, "int8"), (0x0B, "int16"), (0x0C, "int32"), (0x0D, "float32"), (0x0E, "float64")],
)
def test_round_trip(tmp_path, pack, code, dtype):
    items = (ITEMS.astype(dtype) - np.array(3, dtype)).astype(dtype)
    found = read(tmp_path, pack(idx_bytes(items, code)), dtype=dtype, dimensions=3)
    np.testing.assert_array_equal(found, items)
    assert found.dtype == np.dtype(dtype) and found.dtype.isnative and found.flags.writeable


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\0", "cut short: 1 bytes"),
        (b"\0\0\x08", "cut short: 3 bytes"),
        (b"PK\x03\x04 a zip file", "begins with 50 4b"),
        (b"\x80\x04\x95\x10 a pickle", "begins with 80 04"),
        (b"\0\0\x07\x01\0\0\0\x01a", "type code 07"),
        (b"\0\0\x08\0", "has 0 dimensions"),
        (b"\0\0\x08\xff" + b"\0\0\0\x01" * 255 + b"a", "has 255 dimensions"),
        (b"\0\0\x08\x03\0\0\0\x02\0\0", "a header of 10 bytes, where 16 were expected"),
        (b"\0\0\x08\x02\0\0\0\x02\0\0\0\0", "holds no items"),
        (idx_bytes(ITEMS)[:-1], "23 bytes of items, where its header promises 2 x 3 x 4"),
        (idx_bytes(ITEMS) + b"\0", "bytes left over"),
        (gzip.compress(idx_bytes(ITEMS) + b"\0"), "bytes left over"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(idx_bytes(ITEMS))[:-9], "damaged gzip"),
        (gzip.compress(idx_bytes(ITEMS)) + b"garbage", "damaged gzip"),
    ],
)
def test_refusals_say_what_was_expected_and_found(tmp_path, content, words):
    assert words in refusal(tmp_path, content)


def test_expected_type_and_dimensions(tmp_path):
    content = idx_bytes(ITEMS)
    assert "uint8, where float32 was expected" in refusal(tmp_path, content, dtype="float32")
    assert "3 dimensions, where 1 were expected" in refusal(tmp_path, content, dimensions=1)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(SlowmoError, match="There is no file") as error:
        idx.read(tmp_path / "absent", hint="Type: make it")
    assert error.value.hint == "Type: make it"
    with pytest.raises(SlowmoError, match="cannot be read"):
        idx.read(tmp_path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_every_truncation_is_refused(tmp_path, pack):
    content = pack(idx_bytes(ITEMS))
    for size in range(len(content)):
        refusal(tmp_path, content[:size])


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_flipped_bit_is_refused_or_parses(tmp_path, pack):
    whole = idx_bytes(ITEMS)
    content = pack(whole)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = read(tmp_path, bytes(flipped))
        except SlowmoError as error:
            assert error.hint
            continue
        # What parses accounts for every byte; behind gzip's checksum it is what was written.
        assert 4 + 4 * found.ndim + found.nbytes == len(whole)
        if pack is gzip.compress:
            np.testing.assert_array_equal(found, ITEMS)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("size", [2**31 - 1, 2**32 - 1])
def test_a_false_size_takes_no_memory(tmp_path, pack, size):
    content = pack(b"\0\0\x0e\x03" + struct.pack(">3I", size, size, size) + bytes(100))
    tracemalloc.start()
    assert "cut short: 100 bytes" in refusal(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_a_gzip_bomb_is_read_no_further_than_its_header_promises(tmp_path):
    content = gzip.compress(idx_bytes(ITEMS) + bytes(256 * 2**20), compresslevel=1)
    tracemalloc.start()
    assert "bytes left over" in refusal(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20
