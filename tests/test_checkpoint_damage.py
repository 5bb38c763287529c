"""Damaged files: whatever is changed in a checkpoint is noticed, named, and never more than an error.

This file, run as a script, changes files and looks what reading them says: in a process of its own, since HDF5 can
crash on damaged structures. SLOWMO_MUTATIONS sets how many random changes are made, besides those at every border.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import real
from test_checkpoint import Run, layouts, message_of, saves_steps
from torch import nn
from worlds import Real

from slowmo_mpi import OSGP, SGP, Checkpoints, SlowMo, SlowmoError, simulate
from slowmo_mpi.checkpoint import hdf5, seal
from slowmo_mpi.checkpoint.read import Checkpoint
from slowmo_mpi.checkpoint.seal import FIRST_LINE_BYTES, MAGIC, Damaged, proved
from slowmo_mpi.checkpoint.store import newest
from slowmo_mpi.comm import Endpoint

MUTATIONS = int(os.environ.get("SLOWMO_MUTATIONS", "1500"))
SEED = 20_261_122
STEPS = (5, 6)  # in a round, messages in flight


def saves(comm: Endpoint, folder: str, layout: str) -> None:
    """Two checkpoints, two steps apart, of a model with two dtypes, batch-norm and Adam."""
    run = Run(comm, OSGP(delay=3), {"tau": 4}, torch.optim.Adam, {})
    checkpoints = Checkpoints(run.worker, folder, layout=layout, asynchronous=False)
    for step in STEPS:
        run.train(step)
        checkpoints.save({"mine": torch.ones(3), "rank": comm.rank})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, real_worlds: dict[int, Real]) -> Path:
    """A folder with a folder of checkpoints for each layout that can be had here."""
    folder = tmp_path_factory.mktemp("whole")
    if "parallel" in layouts():
        real(real_worlds, 2).run(saves, str(folder / "parallel"), "parallel")
    simulate(2, saves, str(folder / "shards"), "shards")
    return folder


# ---- the script: one file, its places, and what is said of a change there ----
@dataclass
class Victim:
    """A file of a checkpoint that can be opened by `index`; both lie in a scratch folder."""

    index: Path
    path: Path

    def __post_init__(self) -> None:
        self.whole = self.path.read_bytes()
        self.bytes = np.frombuffer(self.whole, dtype=np.uint8)
        self.seal = proved(self.path)
        end = FIRST_LINE_BYTES + int(self.whole[len(MAGIC) : FIRST_LINE_BYTES].split()[1])
        slabs = sorted((o, o + n, f"the data of {s.dataset}, rank {s.rank},") for s in self.seal.slabs
                       for o, n in s.extents)  # fmt: skip
        self.places = [
            (0, len(MAGIC), "first bytes"), (len(MAGIC), FIRST_LINE_BYTES, "first line"),
            (FIRST_LINE_BYTES, end, "its seal was cut off or changed"),
            (end, self.seal.block, "bytes behind its seal were changed"), *slabs,
            *((o, o + n, "its structure") for o, n in seal.rest_of(self.seal.size, self.seal.block, self.seal.slabs)),
        ]  # fmt: skip
        self.places = sorted(p for p in self.places if p[0] < p[1])
        assert self.places[0][0] == 0 and self.places[-1][1] == len(self.whole)
        assert all(a[1] == b[0] for a, b in zip(self.places, self.places[1:], strict=False))

    def wanted(self, data: bytes) -> list[str]:
        """What may be said of these bytes: the place that is looked at first, of those that were changed."""
        if not data:
            return ["it is empty"]
        both = min(len(data), len(self.whole))
        changed = np.flatnonzero(np.frombuffer(data, np.uint8)[:both] != self.bytes[:both])
        changed = np.concatenate([changed, np.arange(both, len(self.whole))])  # what was cut off, too
        hit = [what for start, stop, what in self.places if np.any((changed >= start) & (changed < stop))]
        order = ["first bytes", "first line", self.places[2][2], "its structure", "bytes behind its seal were changed"]
        if len(data) != len(self.whole):
            order[3:] = []
            hit += [f"it has {len(data):,} bytes, and was written with {len(self.whole):,}"]
            return self._head(next((what for what in order if what in hit), hit[-1]))
        return next((self._head(what) for what in order if what in hit), hit)

    @staticmethod
    def _head(what: str) -> list[str]:
        if what == "first bytes":
            return ["it is no checkpoint, or its first bytes were changed"]
        line = ["its first line was cut off or changed", "it has format", "its seal was cut off or changed"]
        return line if what == "first line" else [what]


def at_every_border(v: Victim) -> Iterator[tuple[str, bytes]]:
    """The file cut off, and a bit flipped, on both sides of each place's beginning and end; and made longer."""
    size = len(v.whole)
    borders = sorted({b + d for start, stop, _ in v.places for b in (start, stop) for d in (-1, 0, 1)})
    for b in (b for b in borders if 0 <= b < size):
        yield "cut off", v.whole[:b]
        yield "flipped", flip(v.whole, b, b % 8)
    for start, stop, _ in v.places:
        yield "zeroed", v.whole[:start] + bytes(stop - start) + v.whole[stop:]
        yield "taken out", v.whole[:start] + v.whole[stop:]
    for tail in (b"\0", b"\n", v.whole[-100:], v.whole):
        yield "appended", v.whole + tail


def at_random(v: Victim, random: np.random.Generator) -> tuple[str, bytes]:
    """One change, in a place that is drawn first, so that short ones are hit as often as long ones."""
    start, stop, _ = v.places[random.integers(len(v.places))]
    at, size = int(random.integers(start, stop)), len(v.whole)
    long = min(int(2 ** random.uniform(0, 13)), size - at)
    match random.integers(8):
        case 0:
            return "cut off", v.whole[:at]
        case 1:
            return "zeroed", v.whole[:at] + bytes(long) + v.whole[at + long :]
        case 2:
            return "overwritten", v.whole[:at] + random.bytes(long) + v.whole[at + long :]
        case 3:
            long = min(long, size // 3)
            a, b = sorted((min(at, size - long), int(random.integers(size - long))))
            if b < a + long:
                return "moved", v.whole[:a] + v.whole[a + 1 : b + long] + v.whole[a : a + 1] + v.whole[b + long :]
            middle = v.whole[b : b + long] + v.whole[a + long : b] + v.whole[a : a + long]
            return "swapped", v.whole[:a] + middle + v.whole[b + long :]
        case 4:
            return "appended", v.whole + random.bytes(long)
    return "flipped", flip(v.whole, at, int(random.integers(8)))


def flip(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def said_of(index: Path, by_ranks: bool) -> tuple[str, str]:
    """The kind of error that reading it ends with, and its message; by one process, or by two ranks with `newest`."""
    try:
        if by_ranks:
            simulate(2, lambda comm: newest(index, comm).close())
        else:
            with Checkpoint(index) as checkpoint:
                checkpoint.prove()
    except Exception as error:
        return type(error).__name__, getattr(error, "message", repr(error))
    return "", "nothing was noticed"


def mutate(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Change every file of the checkpoints in turn; how many changes of each kind were made, and what went wrong."""
    random = np.random.default_rng(seed)
    victims = []
    for index in sorted(folder.glob(f"*/step-{STEPS[0]:08}.h5")):
        victims += [Victim(index, path) for path in [index, *sorted(index.parent.glob(f"{index.stem}.shards-*/*"))]]
    changes = [(v, kind, data) for v in victims for kind, data in at_every_border(v)]
    while len(changes) < count:
        v = victims[len(changes) % len(victims)]
        changes.append((v, *at_random(v, random)))
    told: dict[str, Any] = {"made": 0, "kinds": Counter(), "faults": Counter(), "wrong": []}
    for i, (v, kind, data) in enumerate(changes):
        if data == v.whole:  # zeros that were zeroed, say
            continue
        v.path.write_bytes(data)
        error, message = said_of(v.index, by_ranks=i % 8 == 0)
        v.path.write_bytes(v.whole)
        wanted = v.wanted(data)
        found = [words for words in wanted if words in message]
        good = error == ("SlowmoError" if i % 8 == 0 else "Damaged") and found and str(v.path) in message
        if not good:
            told["wrong"].append(f"{v.path.name} {kind}: {error}: {message}; wanted: {wanted}")
        told["made"] += 1
        told["kinds"][f"{v.index.parent.name} {v.path.name} {kind}"] += 1
        told["faults"][
            f"{v.index.parent.name} {v.path.name} {found[0] if found else ''}".partition(" bytes, and")[0]
        ] += 1
    for index in {v.index for v in victims}:
        with Checkpoint(index) as checkpoint:
            checkpoint.prove()  # all was put back
    return told


def test_every_change_of_any_byte_is_noticed_and_named(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files, tmp_path / "scratch")
    command = [sys.executable, str(Path(__file__).resolve()), str(tmp_path / "scratch"), str(MUTATIONS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + MUTATIONS // 10, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert not told["wrong"], f"{len(told['wrong'])}: {told['wrong'][:5]}"
    assert told["made"] >= 0.9 * MUTATIONS and told["made"] >= 1000
    for path in files.glob(f"*/step-{STEPS[0]:08}.h5"):
        with Checkpoint(path) as checkpoint:
            for part in checkpoint.files:
                name = f"{path.parent.name} {part.name}"
                for kind in ("cut off", "flipped", "zeroed", "taken out", "overwritten", "swapped", "appended"):
                    assert told["kinds"].get(f"{name} {kind}"), f"{name} was never {kind}"
                for fault in ("first bytes", "first line", "its seal", "its structure", "bytes behind", "it has"):
                    assert any(f.startswith(name) and fault in f for f in told["faults"]), f"{name}: no {fault}"
            for file, slab in checkpoint.slabs():
                words = f"{path.parent.name} {file.name} the data of {slab.dataset}, rank {slab.rank},"
                assert told["faults"].get(words), f"{words} were never changed"


# ---- whole files in the wrong place ----
@pytest.fixture
def scratch(files: Path, tmp_path: Path) -> Path:
    shutil.copytree(files, tmp_path / "scratch")
    return tmp_path / "scratch"


def refused(path: Path, *words: str, named: Path | None = None) -> None:
    """It is damaged, by these words, for who opens it and for ranks who look for it."""
    for by_ranks in (False, True):
        error, message = said_of(path, by_ranks)
        assert error == ("SlowmoError" if by_ranks else "Damaged"), f"{error}: {message}"
        assert all(w in message for w in words) and str(named or path) in message, message


def shards_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.shards-*/*"))


def test_shards_that_are_missing_or_not_its_own(scratch: Path) -> None:
    index, other = (scratch / "shards" / f"step-{step:08}.h5" for step in STEPS)
    mine, theirs = shards_of(index), shards_of(other)
    assert len(mine) == len(theirs) == 2
    for i, shard in enumerate(mine):
        name, whole = f"its shard {shard.parent.name}/{shard.name}", shard.read_bytes()
        shard.unlink()
        refused(index, name, "is missing")
        shard.write_bytes(theirs[i].read_bytes())
        refused(index, name, "belongs to another checkpoint")
        shard.write_bytes(mine[1 - i].read_bytes())
        refused(index, name, "belongs to another checkpoint")
        shard.write_bytes(b"")
        refused(index, "it is empty", named=shard)
        shard.unlink()
        shard.mkdir()
        refused(index, "Is a directory", named=shard)
        shard.rmdir()
        shard.write_bytes(whole)
        refused(shard, "it is one rank's shard, not the file that shows them all")
    with Checkpoint(index) as checkpoint:
        checkpoint.prove()
    shutil.rmtree(mine[0].parent)
    refused(index, "is missing")


def test_another_format_is_refused_as_such(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed as a later version would seal it: all checksums are right."""
    indices = sorted(scratch.glob(f"*/step-{STEPS[0]:08}.h5"))
    for path in [p for index in indices for p in [index, *shards_of(index)]]:
        whole, found = path.read_bytes(), proved(path)
        with monkeypatch.context() as later:
            later.setattr(seal, "FORMAT", 3)
            text = found.text()
        path.write_bytes(text + whole[len(text) :])
        index = path if path in indices else path.parent.parent / f"step-{STEPS[0]:08}.h5"
        refused(index, "it has format 3, and this version of slowmo-mpi reads format 2", named=path)
        path.write_bytes(whole)


def test_a_shard_that_was_sealed_anew_is_not_its_own(scratch: Path) -> None:
    """Changed data with a seal that fits them: only the file that shows the shards knows."""
    index = scratch / "shards" / f"step-{STEPS[0]:08}.h5"
    shard = shards_of(index)[0]
    found, data = proved(shard), bytearray(shard.read_bytes())
    first = found.slabs[0]
    data[first.extents[0][0]] ^= 1
    (offset, length), *_ = first.extents
    slabs = [replace(first, checksum=seal.checksum(data[offset : offset + length])), *found.slabs[1:]]
    text = replace(found, slabs=slabs).text()
    shard.write_bytes(text + data[len(text) :])
    assert proved(shard).slabs[0].checksum != first.checksum
    refused(index, "belongs to another checkpoint")


def test_what_is_no_checkpoint_at_all(scratch: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.h5"
    path.write_text("Dear all,\n" * 100)
    refused(path, "it is no checkpoint")
    path.write_bytes(b"")
    refused(path, "it is empty")
    with hdf5.load().File(path, "w") as file:
        file["z"] = np.ones(3)
    refused(path, "it is an HDF5 file of something else")
    path.write_bytes(MAGIC + b"2 2 3".ljust(FIRST_LINE_BYTES - len(MAGIC) - 1) + b"\n")
    refused(path, "its seal was cut off or changed")
    path.write_bytes(MAGIC + b"9" * 30 + b" 2 3".ljust(FIRST_LINE_BYTES - len(MAGIC) - 31) + b"\n")
    refused(path, "it has format 9999")
    path.unlink()
    with pytest.raises(Damaged, match="No such file"):
        Checkpoint(path)
    path.symlink_to(path)
    with pytest.raises(Damaged, match="symbolic links"):
        Checkpoint(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(Damaged, match="Is a directory"):
        Checkpoint(path)
    with pytest.raises(SlowmoError, match="Is a directory"):
        simulate(2, lambda comm: newest(tmp_path, comm))


# ---- whole files of another model ----
@pytest.mark.parametrize(
    "change, parameter, how",
    [
        (lambda m: m.append(nn.Linear(2, 2)), "2.weight", "name"), (lambda m: m.pop(1), "1.weight", "name"),
        (lambda m: m.__setitem__(1, nn.Linear(2, 1)), "1.weight", "shape"),
        (lambda m: m[0].bfloat16(), "0.weight", "vector"), (lambda m: m[1].requires_grad_(False), "1.weight", "name"),
        (lambda m: m.append(nn.BatchNorm1d(2, affine=False)), "buffers", "names"),
    ],
    ids=["longer", "shorter", "another shape", "another type", "frozen", "another buffer"],
)  # fmt: skip
def test_another_model_is_refused_by_the_name_of_its_parameter(
    change: Callable[[nn.Sequential], object], parameter: str, how: str, tmp_path: Path
) -> None:
    def loads(comm: Endpoint) -> str:
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        change(model)
        worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, SGP(), tau=4)
        return message_of(comm, lambda _: worker.load(tmp_path))

    simulate(2, saves_steps, str(tmp_path), 1, "auto")
    for message in simulate(2, loads):
        assert "of another model" in message and parameter in message and how in message, message


if __name__ == "__main__":
    print(json.dumps(mutate(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
