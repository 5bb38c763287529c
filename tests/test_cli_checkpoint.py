"""slowmo checkpoint list, show, verify, export, diff: of simulated ranks (a file each) and of real ones (one file)."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from slowmo_mpi import OSGP, SGP, Local, SlowMo, simulate
from slowmo_mpi.checkpoint import hdf5, inspect
from slowmo_mpi.checkpoint.export import save
from slowmo_mpi.checkpoint.inspect import opened
from slowmo_mpi.checkpoint.read import resolve
from slowmo_mpi.checkpoint.seal import proved, rest_of
from slowmo_mpi.checkpoints import Checkpoints
from slowmo_mpi.cli.checkpoint import checkpoint as group
from slowmo_mpi.errors import SlowmoError, UsageError

CONFIG = "[run]\nsteps = 20\n[slowmo]\ntau = 8\n"
TAU = 8
BOTH = pytest.mark.parametrize("world", ["simulated-2", "mpi-2"], indirect=True)
UNEVEN = "ranks = 2\n[[step]]\nedges = [[0, 1, 0.3], [1, 0, 0.6]]\n"  # so that push-sum weights differ from 1


class Net(nn.Module):
    """Batch-norm, tied weights, a frozen parameter, other buffers, channels-last weights, two types."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 4, 3, dtype=dtype).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4, dtype=dtype)
        self.first = nn.Linear(16, 16, dtype=dtype)
        self.second = nn.Linear(16, 16, dtype=dtype)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(16, 16, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(16, 1, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).flatten(1)
        return self.head(self.second(self.frozen(self.first(x).relu())).double())


def program(comm: Any, folder: str, base: Any, steps: tuple[int, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """Train, save at each of `steps`; at the last one what a worker has, and what the average is."""
    dtype, config = settings.get("dtype", torch.float32), settings.get("config", CONFIG)
    model = Net(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.get("lr", 0.1), momentum=0.9)
    worker = SlowMo(model, optimizer, comm, base, tau=TAU, buffers="maintain")
    checkpoints = Checkpoints(worker, folder, keep=9, asynchronous=False, config=config)
    torch.manual_seed(comm.rank + 1)
    for step in range(steps[-1]):
        data = torch.Generator().manual_seed(100 * step + comm.rank)
        loss = model(torch.randn(4, 2, 4, 4, generator=data).to(dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        worker.step()
        model.seen += comm.rank + 1
        if step + 1 in steps:
            checkpoints.save(settings.get("extra"))
    own = {k: t.clone() for k, t in model.state_dict().items()}
    with worker.averaged():
        averaged = {k: t.clone() for k, t in model.state_dict().items()}
    flight = worker.state.in_flight
    tree = worker.state_dict()
    return {"own": own, "averaged": averaged, "w": tree["w"], "age": flight.age if flight else None}


@dataclass
class Made:
    folder: Path  # of a run
    ranks: list[dict[str, Any]]
    parallel: bool

    @property
    def newest(self) -> Path:
        return max((self.folder / "checkpoints").glob("step-*.h5"))


@pytest.fixture(scope="module")
def kept() -> dict[Any, Made]:
    return {}


@pytest.fixture
def made(world, kept, tmp_path_factory):
    """Makes checkpoints in `world`; those of the same arguments once."""

    def make(base: str = "local", steps: tuple[int, ...] = (5,), again: int = 0, **settings: Any) -> Made:
        real = type(world).__name__ == "Real"
        key = (real, base, steps, again, repr(settings))
        if key not in kept:
            folder = tmp_path_factory.mktemp("run")
            graph = folder / "uneven.toml"
            graph.write_text(UNEVEN)
            bases = {"local": Local(), "sgp": SGP(str(graph)), "osgp": OSGP(str(graph)), "late": OSGP(str(graph), 3)}
            found = world.run(program, str(folder / "checkpoints"), bases[base], steps, settings)
            kept[key] = Made(folder, found, real and hdf5.writes_together())
        return kept[key]

    return make


def run(*arguments: Any):
    return CliRunner().invoke(group, list(map(str, arguments)))


def data_of(*arguments: Any, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.stderr or result.exception
    return json.loads(result.stdout)


def refused(*arguments: Any, kind: type[SlowmoError] = UsageError) -> str:
    result = run(*arguments)
    assert type(result.exception) is kind or isinstance(result.exception, kind), result.exception
    assert result.exception.hint and result.stdout == ""
    return result.exception.message


def copy_of(made: Made, to: Path) -> Made:
    shutil.copytree(made.folder, to)
    return Made(to, made.ranks, made.parallel)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def piece_of(path: Path) -> int:
    """Where data of z lie in the file, or in its first shard."""
    return next(s for s in proved(path).slabs if s.dataset == "z/float32").extents[0][0]


def first_with_data(made: Made) -> Path:
    return made.newest if made.parallel else sorted(made.newest.parent.glob(f"{made.newest.stem}.shards-*/*"))[0]


# ---- list ----
@BOTH
def test_list_tells_the_newest_first_and_shards_count(made):
    run_ = made(steps=(3, 5, 8)).folder
    lines = run("list", run_).stdout.splitlines()
    assert lines[0].split() == ["step", "round", "ranks", "layout", "size", "written", "file", "state"]
    assert [line.split()[:3] for line in lines[1:]] == [["8", "1", "2"], ["5", "0", "2"], ["3", "0", "2"]]
    assert all(line.endswith("  whole") for line in lines[1:])
    found = data_of("list", run_)
    assert [c["step"] for c in found] == [8, 5, 3] and {c["layout"] for c in found} <= {"shards", "parallel"}
    assert sum(c["bytes"] for c in found) == sum(p.stat().st_size for p in run_.rglob("*.h5"))
    assert data_of("list", run_ / "checkpoints") == found
    assert [c["step"] for c in data_of("list", found[1]["file"])] == [5]


@BOTH
def test_list_goes_on_after_a_damaged_one(made, tmp_path):
    run_ = copy_of(made(steps=(3, 5, 8)), tmp_path / "run")
    middle = run_.folder / "checkpoints" / "step-00000005.h5"
    flip(middle, 100)
    result = run("list", run_.folder)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[2].split()[:4] == ["5", "-", "-", "-"] and "its seal was cut off or changed" in lines[2]
    assert [c["fault"] is None for c in data_of("list", run_.folder)] == [True, False, True]


# ---- show ----
@BOTH
def test_show_tells_all(made):
    m = made(steps=(5,))
    out = run("show", m.folder).stdout  # the newest of the run
    for line in (
        "step        5", "ranks       2", f"layout      {'parallel' if m.parallel else 'shards'}", "  z/float32 ",
        "  conv.weight  ", "[slowmo]\ntau = 8",
    ):  # fmt: skip
        assert line in out, line
    assert out.rstrip().endswith(CONFIG.rstrip())
    shown = data_of("show", m.newest)
    assert shown["attributes"]["step"] == 5 and shown["config"] == CONFIG and "torch" in shown["versions"]
    assert list(shown["model"]) == list(m.ranks[0]["own"])
    assert shown["model"]["second.weight"] == shown["model"]["first.weight"] == "trained:first.weight"
    by_name = {d["name"]: d for d in shown["datasets"]}
    assert by_name["z/float32"]["shape"] == [2, by_name["z/float32"]["bytes"] // 8]
    assert by_name["z/float64"]["type"] == "float64" and by_name["state"]["type"] == "text"
    parameters = {p["name"]: p for p in shown["parameters"]}
    assert parameters["conv.weight"]["shape"] == [4, 2, 3, 3] and parameters["conv.weight"]["strides"] == [18, 1, 6, 2]
    assert shown["elements"] == sum(p.numel() for p in Net().parameters() if p.requires_grad)
    with opened(m.newest) as c:
        assert shown["slabs"] == len(list(c.slabs())) > 0
        assert len(shown["files"]) == (1 if m.parallel else 3)


@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_show_names_the_type_that_bits_stand_for(made):
    shown = data_of("show", made(dtype=torch.bfloat16).newest)
    assert {d["type"] for d in shown["datasets"] if d["name"].startswith("z/")} == {"bfloat16", "float64"}


# ---- verify ----
@BOTH
def test_verify_says_ok(made):
    m = made(steps=(3, 5, 8))
    result = run("verify", m.folder)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{m.folder / 'checkpoints' / f'step-{step:08}.h5'}: ok" for step in (8, 5, 3)
    ]  # fmt: skip
    assert data_of("verify", m.newest) == [{"file": str(m.newest), "ok": True, "fault": None}]


@BOTH
def test_verify_names_every_fault_and_ends_with_3(made, tmp_path):
    whole = made(steps=(3, 5, 8))

    def damaged(name: str) -> Made:
        return copy_of(made(), tmp_path / name)

    data, structure, text, empty, cut = (damaged(n) for n in ("data", "structure", "text", "empty", "cut"))
    flip(first_with_data(data), piece_of(first_with_data(data)))
    seal = proved(structure.newest)
    offset, length = next(iter(rest_of(seal.size, seal.block, seal.slabs)))
    flip(structure.newest, offset + length // 2)
    text.newest.write_text("not a checkpoint\n")
    empty.newest.write_bytes(b"")
    os.truncate(first_with_data(cut), first_with_data(cut).stat().st_size - 100)
    given = [data, structure, text, empty, cut]
    words = [
        "the data of z/float32, rank 0, was changed", "its structure", "no checkpoint", "it is empty",
        "was written with",
    ]  # fmt: skip
    if not whole.parallel:
        lost = damaged("lost")
        first_with_data(lost).unlink()
        other = damaged("other")
        shutil.copy(first_with_data(whole), first_with_data(other))
        flipped = damaged("flipped")
        flip(first_with_data(flipped), proved(first_with_data(flipped)).block + 10)
        given += [lost, other, flipped]
        words += ["rank-00000.h5 is missing", "belongs to another checkpoint", "rank-00000.h5: its structure"]
    files = [m.newest for m in given] + [tmp_path / "no.h5", tmp_path]
    words += ["it is missing", "it has no checkpoint"]

    result = run("verify", *files, whole.newest)  # all are checked, whatever was found before
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert len(lines) == len(words) + 1 and lines[-1] == f"{whole.newest}: ok"
    for line, file, word in zip(lines, files, words, strict=False):
        assert line.startswith(f"{file}: ") and word in line
    assert result.stderr == f"{len(words)} of {len(words) + 1} not whole\n"
    found = data_of("verify", *files, whole.newest, code=3)
    assert [f["ok"] for f in found] == [False] * len(words) + [True] and words[1] in found[1]["fault"]
    assert "not usable" in refused("show", text.newest, kind=SlowmoError)
    assert "not usable" in refused("export", data.newest, tmp_path / "x.pt", kind=SlowmoError)
    assert "not usable" in refused("diff", data.newest, whole.newest, kind=SlowmoError)


@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_a_shard_alone_is_no_checkpoint(made, tmp_path):
    shard = first_with_data(made())
    assert "one rank's shard" in run("verify", shard).stdout
    assert "one rank's shard" in refused("export", shard, tmp_path / "x.pt", kind=SlowmoError)


@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_what_a_running_job_deletes_meanwhile_is_no_fault(made, monkeypatch):
    m = made(steps=(3, 5, 8))
    gone = m.folder / "checkpoints" / "step-00000001.h5"
    monkeypatch.setattr(
        inspect, "resolve", lambda place: [m.newest, gone] if place == str(m.folder) else resolve(place)
    )
    assert run("verify", m.folder).stdout == f"{m.newest}: ok\n"
    assert [c["step"] for c in data_of("list", m.folder)] == [8]


def test_the_command_itself_ends_with_3(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))
    done = subprocess.run(
        [sys.executable, "-m", "slowmo_mpi", "checkpoint", "verify", str(tmp_path / "a.h5")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "an HDF5 file of something else" in done.stdout


# ---- export ----
def loaded(out: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """By what anybody has: into a fresh model, with nothing missing and nothing left over."""
    model = Net(dtype, seed=1)
    model.load_state_dict(load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True))
    return model.state_dict()


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert list(found) == list(expected)
    for key, t in expected.items():
        assert found[key].dtype == t.dtype
        torch.testing.assert_close(found[key], t, rtol=0, atol=atol, msg=key)


@BOTH
@pytest.mark.parametrize(
    "base, steps, dtype, atol",
    [
        ("local", 8, torch.float32, 1e-6),  # a round's boundary
        ("late", 8, torch.float32, 1e-6),
        ("late", 8, torch.bfloat16, 2**-8),
        ("local", 5, torch.float32, 1e-6),
        ("sgp", 5, torch.float32, 1e-6),
        ("osgp", 5, torch.float32, 1e-6),
        ("late", 2, torch.float32, 1e-6),  # all ranks sent the same packet
        ("late", 4, torch.float32, 1e-6),
        ("late", 5, torch.float32, 1e-6),
        ("late", 5, torch.bfloat16, 2**-8),
    ],
)
def test_export_is_the_average_of_the_workers(made, tmp_path, base, steps, dtype, atol):
    m = made(base, (steps,), dtype=dtype)
    expected, w = m.ranks[0]["averaged"], [r["w"] for r in m.ranks]
    if steps % TAU:
        assert not torch.equal(m.ranks[0]["own"]["conv.weight"], m.ranks[1]["own"]["conv.weight"])
        assert base == "local" or all(abs(x - 1) > 0.05 for x in w)
        assert (base == "late") == (m.ranks[0]["age"] in (1, 2))
    for suffix in (".safetensors", ".pt"):
        out = tmp_path / f"model{suffix}"
        result = run("export", m.newest, out)
        assert result.exit_code == 0 and result.stdout == "", result.exception
        assert f"Wrote {out}: step {steps}, the average of 2, {len(expected)} tensors" in result.stderr
        assert_near(loaded(out, dtype), expected, atol)
        if steps % TAU == 0:  # all workers are equal, and the average is what each has, to the bit
            assert_near(loaded(out, dtype), m.ranks[0]["own"], 0.0)
        for rank in (0, 1):
            assert run("export", m.newest, out, "--rank", rank, "--force").exit_code == 0
            assert_near(loaded(out, dtype), m.ranks[rank]["own"], 0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "model.safetensors"]


@BOTH
def test_export_holds_plain_tensors_and_tied_ones(made, tmp_path):
    m = made("late", (5,))
    assert run("export", m.folder, tmp_path / "m.pt").exit_code == 0  # the newest of the run
    assert run("export", m.folder, tmp_path / "m.safetensors").exit_code == 0
    plain = torch.load(tmp_path / "m.pt", weights_only=True)
    assert type(plain) is dict and list(plain) == list(m.ranks[0]["own"])
    assert plain["first.weight"].data_ptr() == plain["second.weight"].data_ptr()
    assert all(type(t) is torch.Tensor and t.is_contiguous() and not t.requires_grad for t in plain.values())
    assert plain["conv.weight"].untyped_storage().nbytes() == 4 * 4 * 2 * 3 * 3  # not the whole flat vector
    safe = load_file(tmp_path / "m.safetensors")
    assert set(safe) == set(plain) and all(torch.equal(safe[k], plain[k]) for k in safe)
    assert plain["seen"] == 5 and plain["mask"].tolist() == [True, False] and "cache" not in plain


@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_export_refuses_what_cannot_be_meant(made, tmp_path):
    file, out = made().newest, tmp_path / "model.pt"
    assert "no rank 2: 2 wrote it" in refused("export", file, out, "--rank", 2)
    assert run("export", file, out, "--rank", -1).exit_code == 2
    assert "neither .safetensors nor .pt" in refused("export", file, tmp_path / "model.pth")
    assert "Did you mean '.safetensors'" in refused("export", file, tmp_path / "model.safetensor")
    assert "There is no folder" in refused("export", file, tmp_path / "missing" / "model.pt")
    assert "There is no" in refused("export", tmp_path / "no.h5", out)
    (tmp_path / "folder.pt").mkdir()
    assert "is a folder" in refused("export", file, tmp_path / "folder.pt", "--force")
    out.write_text("mine")
    assert "is there already" in refused("export", file, out)
    assert out.read_text() == "mine"
    assert run("export", file, out, "--force").exit_code == 0
    assert loaded(out) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_on_a_full_disk_leaves_what_was_there(tmp_path, suffix):
    out = tmp_path / f"model{suffix}"
    out.write_text("mine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SlowmoError, match=r"cannot be written: .*File too large"):
            save({"a": torch.zeros(10_000)}, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


# ---- diff ----
@BOTH
def test_diff_of_the_same_run_twice(made):
    one, other = (made("late", (5,), again=again).newest for again in (1, 2))
    result = run("diff", one, other)
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[:3] == [f"A  {one}", f"B  {other}", "vectors"]
    assert all(line.endswith("  the same") for line in lines[3:-1]) and len(lines) > 10
    assert lines[-1] == "Training goes on alike from both."
    found = data_of("diff", one, other)
    assert found["same"] and not (found["attributes"] or found["state"] or found["config"] or found["versions"])


@BOTH
def test_diff_says_what_differs(made):
    config = CONFIG.replace("tau = 8", "tau = 8\nbeta = 0.2")
    a, b = made("late", (5,), again=1), made("late", (7,), config=config, lr=0.05)
    result = run("diff", a.folder, b.folder)
    assert result.exit_code == 3
    for words in ("step 5 | 7", "slowmo.beta 0.6 | 0.2", "last_rates/0 0.1 | 0.05 (ranks 0, 1)",
                  "optimizer/groups/0/lr 0.1 | 0.05 (ranks 0, 1)", "rng/int64 the same"):  # fmt: skip
        assert words in " ".join(result.stdout.split()), words
    assert result.stdout.endswith("Training goes on differently from them.\n")
    found = data_of("diff", a.newest, b.newest, code=3)
    assert found["attributes"] == {"step": [5, 7]} and found["config"] == {"slowmo.beta": [0.6, 0.2]}
    assert {"rank": 1, "path": "step", "a": 5, "b": 7} in found["state"]
    with opened(a.newest) as x, opened(b.newest) as y:
        distance = torch.stack([x.vector("z/float32", r) - y.vector("z/float32", r) for r in (0, 1)]).double()
    told = found["vectors"]["z/float32"]
    assert told["differ"] == int((distance != 0).sum()) and told["elements"] == distance.numel()
    assert told["largest"] == pytest.approx(float(distance.abs().max()), rel=1e-6)
    assert found["vectors"]["frozen/float32"] == {"elements": 272, "differ": 0, "largest": 0.0, "note": ""}


@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_diff_does_not_count_what_the_loop_keeps_for_itself(made):
    a = made("late", (5,), again=1)
    b = made("late", (5,), config="", extra={"seconds": 1.5, "x": torch.ones(2)})
    c = made("late", (5,), config="", extra={"seconds": 2.5, "x": torch.zeros(2)})
    found = data_of("diff", b.newest, c.newest)
    assert found["same"] and found["vectors"]["extra/float32"]["differ"] == 2 and len(found["state"]) == 2
    found = data_of("diff", a.newest, b.newest)
    assert found["config"] == {}  # nothing is said of one that was not given
    assert found["vectors"]["extra/float32"]["note"] == "the first has none"


@pytest.mark.parametrize("world", ["simulated-2"], indirect=True)
def test_diff_of_other_ranks_and_other_models(made, tmp_path):
    two = made("local", (8,))
    simulate(3, program, str(tmp_path), Local(), (8,), {})
    found = data_of("diff", two.folder, tmp_path, code=3)
    assert found["attributes"] == {"ranks": [2, 3]} and found["state"] == []
    assert found["state_note"] == "2 ranks and 3"
    vectors = found["vectors"]
    assert vectors["frozen/float32"]["differ"] == 0 and vectors["z/float32"]["differ"] > 0  # the same on all ranks
    assert "of 2 ranks and of 3: cannot be compared" in vectors["optimizer/momentum_buffer/float32"]["note"]
    assert "not compared  2 ranks and 3" in run("diff", two.folder, tmp_path).stdout

    half = made("local", (8,), dtype=torch.bfloat16)
    found = data_of("diff", two.newest, half.newest, code=3)
    assert found["vectors"]["z/float32"]["note"] == "the second has none"
    assert found["parameters"]["conv.bias"][0].startswith("float32") and "head.bias" not in found["parameters"]


def test_diff_sees_bits_and_nan(tmp_path):
    """0.0 and -0.0 differ, nan and the same nan do not."""

    def write(comm, folder, values):
        model = nn.Linear(3, 1, bias=False)
        worker = SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, Local(), tau=2)
        model.weight.data.copy_(torch.tensor([values]))
        torch.manual_seed(0)
        worker.save(folder / "step-00000000.h5")

    for name, values in (("a", [0.0, math.nan, 1.0]), ("b", [-0.0, math.nan, 1.0]), ("c", [0.0, 2.0, 1.0])):
        simulate(1, write, tmp_path / name, values)
    found = data_of("diff", tmp_path / "a", tmp_path / "b", code=3)["vectors"]["z/float32"]
    assert found == {"elements": 16, "differ": 1, "largest": 0.0, "note": ""}
    found = data_of("diff", tmp_path / "a", tmp_path / "c", code=3)["vectors"]["z/float32"]
    assert found["differ"] == 1 and found["largest"] is None
    assert "1 of 16 elements differ, by nan at most" in run("diff", tmp_path / "a", tmp_path / "c").stdout


# ---- what is typed wrong ----
@pytest.mark.parametrize("command", [("list",), ("show",), ("diff", "."), ("export", "x.pt")])
def test_nothing_there_says_so(command, tmp_path):
    name, *rest = command
    assert "There is no " in refused(name, tmp_path / "no", *rest)
    assert "has no checkpoint" in refused(name, tmp_path, *rest)
    assert "cannot be read" in refused(name, "a" * 300, *rest)


def test_missing_arguments_are_wrong_usage():
    for command in ("list", "show", "verify", "export", "diff"):
        assert run(command).exit_code == 2
