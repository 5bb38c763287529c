"""Going on with a run as the command does: the same numbers to the bit, refusals, signals, and the run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_faults import CONFIG, FAULTY, command, run
from worlds import Real, Simulated

from slowmo_mpi import config, simulate
from slowmo_mpi.checkpoint.read import Checkpoint
from slowmo_mpi.comm import Endpoint
from slowmo_mpi.errors import DONE, FAILED, STOPPED_EARLY, USAGE, SlowmoError, UsageError
from slowmo_mpi.plan import plan
from slowmo_mpi.resume import checkpoint_of, unfinished
from slowmo_mpi.train import BASES, train

LIMIT_S = 120
DIGITS = """
[run]
epochs = 2
log_every = 7
[task]
name = "digits"
batch_size = 40
hidden = 16
[optimizer]
lr = 0.05
momentum = 0.9
schedule = "cosine"
warmup = 0.5
[slowmo]
tau = 5
beta = 0.3
buffers = "maintain"
[checkpoint]
every = 1
keep = 100
"""
TIMES = ("samples_per_s", "communication_share", "input_share", "time_s")


def settings(*overrides: str) -> config.Config:
    return config.parse(DIGITS, "a test", overrides)


def begin(comm: Endpoint, wanted: config.Config, folder: Path) -> dict[str, Any]:
    return train(wanted, comm, folder)


def go_on(
    comm: Endpoint, wanted: config.Config, folder: Path, place: Path, allowed: tuple[str, ...] = ()
) -> dict[str, Any]:
    return train(wanted, comm, folder, resume=checkpoint_of(place, wanted, allowed, comm, print))


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


def same_files(a: Path, b: Path) -> None:
    """Two checkpoints with the same state to the bit: every rank's numbers, every vector."""
    with Checkpoint(a) as one, Checkpoint(b) as other:
        one.prove()
        other.prove()
        assert one.datasets == other.datasets
        for rank in range(one.ranks):
            trees = [json.loads(c.text(rank)) for c in (one, other)]
            for tree in trees:  # clocks
                del tree["extra"]["elapsed_s"], tree["extra"]["window"], tree["extra"]["last"]
            assert trees[0] == trees[1]
            for name in one.datasets:
                if not name.startswith("extra"):
                    assert torch.equal(one.vector(name, rank), other.vector(name, rank)), name


@pytest.mark.parametrize("algorithm", BASES)
@pytest.mark.parametrize("world", ["simulated-1", "simulated-3", "mpi-2", "mpi-4"], indirect=True)
def test_a_resumed_run_is_the_uninterrupted_one(world: Real | Simulated, algorithm: str, tmp_path: Path) -> None:
    """model.pt, every later line of metrics.jsonl but the times, and the last checkpoint: at a boundary, in mid-round,
    across an epoch's end; in a new folder from a file, and in place from a folder."""
    wanted = settings(f"base.algorithm={algorithm}", "base.topology=ring-bidirectional")
    whole = tmp_path / "whole"
    whole.mkdir()
    world.run(begin, wanted, whole)
    steps = lines(whole)[-1]["step"]
    name = f"checkpoints/step-{steps:08}.h5"
    per_epoch = steps // 2
    for step in (5, 7, per_epoch - 1, per_epoch, steps - 1):
        if not 0 < step < steps:
            continue
        here = tmp_path / f"from-{step}"
        here.mkdir()
        place = whole / f"checkpoints/step-{step:08}.h5"
        world.run(go_on, wanted, here, place)
        assert lines(here) == [r for r in lines(whole) if r["step"] > step]
        same_files(whole / name, here / name)
        models = [torch.load(f / "model.pt", weights_only=True) for f in (whole, here)]
        assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    # In place: as a run that was killed leaves it, with a line that was cut off.
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for path in (cut / "checkpoints").glob("step-*.h5"):
        if int(path.stem[5:]) > 5:
            path.unlink()
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    world.run(go_on, wanted, cut, cut)
    assert lines(cut) == lines(whole)
    same_files(whole / name, cut / name)
    manifest = json.loads((cut / "manifest.json").read_text())
    assert manifest["resumed_at_step"] == 5 and len(manifest["lives"]) == 1 and manifest["result"] == "done"


@pytest.mark.parametrize("algorithm", ["allreduce", "sgp", "osgp"])
def test_the_plan_tells_the_size_of_a_checkpoint(algorithm: str, tmp_path: Path) -> None:
    wanted = settings(
        f"base.algorithm={algorithm}", "base.delay=2", "task.hidden=2000", "run.epochs=0", "run.steps=8",
        "checkpoint.every=8", "optimizer.schedule=constant", "optimizer.warmup=0.0",
    )  # fmt: skip
    simulate(2, begin, wanted, tmp_path)
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*.h5"))
    assert size == pytest.approx(plan(wanted, 2).checkpoint_bytes, rel=0.05)


def test_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    """4 -> 2 -> 3 -> 1 -> 4, each at a round's boundary: steps and epochs go on, and the model still learns."""
    folder = tmp_path
    done = 0
    last: dict[str, Any] = {}
    for ranks in (4, 2, 3, 1, 4):
        done += 10
        wanted = settings("run.epochs=0", f"run.steps={done}", "optimizer.schedule=constant", "run.eval_every=10")
        program = begin if done == 10 else go_on
        last = simulate(ranks, program, wanted, folder, *([] if done == 10 else [folder]))[0]
        assert last["step"] == done
    records = lines(folder)
    assert [r["step"] for r in records if r["kind"] == "eval"] == [10, 20, 30, 40, 50]
    epochs = [r["epoch"] for r in records]
    assert epochs == sorted(epochs) and last["accuracy"] > 0.8
    assert len(json.loads((folder / "manifest.json").read_text())["lives"]) == 4


def test_another_number_of_ranks_only_at_a_boundary(tmp_path: Path) -> None:
    wanted = settings("run.epochs=0", "run.steps=8", "optimizer.schedule=constant")
    simulate(2, begin, wanted, tmp_path)
    with pytest.raises(SlowmoError, match=r"in the middle of a round \(step 8, tau 5\)"):
        simulate(3, go_on, wanted, tmp_path, tmp_path)


def test_a_configuration_that_means_something_else_is_refused(tmp_path: Path) -> None:
    first = settings("run.epochs=0", "run.steps=6", "optimizer.schedule=constant")
    simulate(2, begin, first, tmp_path)
    longer = ["run.epochs=0", "run.steps=9", "optimizer.schedule=constant"]
    now = settings(*longer, "optimizer.lr=0.01", "task.hidden=17", "run.log_every=3", "slowmo.sharded=true")
    with pytest.raises(UsageError, match=r"optimizer.lr was 0.05 and is 0.01; task.hidden was 16 and is 17") as error:
        simulate(2, go_on, now, tmp_path, tmp_path)
    assert "--allow-changed optimizer.lr --allow-changed task.hidden" in error.value.hint
    with pytest.raises(SlowmoError, match=r"another model: parameter \S+ differs"):
        simulate(2, go_on, now, tmp_path, tmp_path, ("optimizer.lr", "task.hidden"))
    for change, check in (
        ("optimizer.momentum=0.5", lambda o: o["groups"][0]["momentum"] == 0.5),
        ("optimizer.lr=0.01", lambda o: o["groups"][0]["lr"] == 0.01),
        ("optimizer.name=torch.optim:RMSprop", lambda o: "square_avg" in next(iter(o["state"].values()))),
    ):
        now = settings(*longer, change, *(["optimizer.momentum=0.0"] if "RMS" in change else []))
        here = tmp_path / change.replace(":", "-")
        here.mkdir()
        simulate(
            2,
            go_on,
            now,
            here,
            tmp_path / "checkpoints" / "step-00000006.h5",
            ("optimizer.momentum", "optimizer.name", "optimizer.lr"),
        )
        with Checkpoint(here / "checkpoints" / "step-00000009.h5") as checkpoint:
            assert check(checkpoint.tree(0)["optimizer"]), change


@pytest.mark.parametrize(
    "change, moves",
    [
        ("run.name=other", False), ("run.steps=500", False), ("comm.timeout=3", False), ("checkpoint.keep=9", False),
        ("slowmo.sharded=true", False), ("task.data=there", False), ("run.seed=1", True), ("slowmo.tau=3", True),
        ("base.delay=2", True), ("task.batch_size=3", True), ("task.hidden=3", True), ("optimizer.lr=1", True),
    ],
)  # fmt: skip
def test_which_keys_move_the_trajectory(change: str, moves: bool) -> None:
    text = '[run]\nsteps = 10\n[task]\nname = "digits"\n'
    key = change.partition("=")[0]
    found = config.changed(config.parse(text), config.parse(text, "a test", [change]))
    assert found == ([key] if moves else [])


def test_the_length_matters_where_the_rate_depends_on_it() -> None:
    text = '[run]\nepochs = 10\n[optimizer]\nschedule = "cosine"\n'
    assert config.changed(config.parse(text), config.parse(text, "", ["run.epochs=11"])) == ["run.epochs"]
    both = ["run.epochs=0", "run.steps=100", "optimizer.schedule=constant"]
    before = config.parse(text, "", ["optimizer.schedule=constant"])
    assert config.changed(before, config.parse(text, "", both)) == ["run.epochs", "run.steps"]


@pytest.mark.parametrize("text, wanted", [("5h50m", 21000), ("90s", 90), ("1d2h", 93600), ("", float("inf"))])
def test_wall_times(text: str, wanted: float) -> None:
    assert config.seconds(text) == wanted


@pytest.mark.parametrize("text", ["5", "h", "5 hours", "-1s", "1m1h"])
def test_what_is_no_wall_time(text: str) -> None:
    with pytest.raises(UsageError, match=r"run\.stop_after"):
        settings(f'run.stop_after="{text}"')


class Counting:
    """A task with a state of its own: its loss depends on how often it was called."""

    def __init__(self) -> None:
        self.model, self.train, self.test, self.calls = torch.nn.Linear(3, 1), self, None, 0

    def __len__(self) -> int:
        return 1000

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[:, None] * torch.ones(3) / 1000

    def loss(self, model: Any, batch: torch.Tensor) -> Any:
        self.calls += 1
        return (model(batch) - self.calls).square().mean(), {}

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def counting(context: Any) -> Counting:
    return Counting()


def test_a_task_with_a_state_of_its_own(tmp_path: Path) -> None:
    text = (
        '[run]\nsteps = 9\n[task]\nname = "test_resume:counting"\nbatch_size = 2\n[checkpoint]\nevery = 4\nkeep = 9\n'
    )
    wanted = config.parse(text)
    for name in ("whole", "rest"):
        (tmp_path / name).mkdir()
    simulate(2, begin, wanted, tmp_path / "whole")
    simulate(2, go_on, wanted, tmp_path / "rest", tmp_path / "whole" / "checkpoints" / "step-00000004.h5")
    last = "checkpoints/step-00000009.h5"
    same_files(tmp_path / "whole" / last, tmp_path / "rest" / last)


# ---- from outside ----
@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with my.toml, a task of test_faults that dawdles where it is to be caught in the middle."""
    dawdling = "self.steps += 1; time.sleep(float(os.environ.get('DAWDLE_S', 0)))"
    (tmp_path / "faulty.py").write_text(FAULTY.replace("self.steps += 1", dawdling))
    (tmp_path / "my.toml").write_text(CONFIG.replace("1000000", "1200") + "[checkpoint]\nevery = 100\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(program: list[str], env: dict[str, str], until: str = "step ") -> subprocess.Popen[str]:
    """The command, dawdling, once it has said `until`."""
    with open("stderr", "w") as stderr:
        job = subprocess.Popen(
            program, env={**env, "DAWDLE_S": "0.005"}, stdin=subprocess.DEVNULL, stderr=stderr, text=True
        )
    deadline = time.monotonic() + LIMIT_S
    while until not in Path("stderr").read_text() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.poll() is None, Path("stderr").read_text()
    return job


def final(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The model that 1,200 steps on two ranks give."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "my.toml").write_text(CONFIG.replace("1000000", "1200"))
    done = subprocess.run(
        [sys.executable, "-m", "slowmo_mpi", "train", "my.toml", "--simulate", "2"], cwd=folder, timeout=LIMIT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == DONE, done.stderr
    return final(next((folder / "runs").iterdir()))


@pytest.mark.parametrize(
    "how, number",
    [
        ("-n", signal.SIGTERM), ("-n", signal.SIGUSR2), ("mpirun", signal.SIGUSR1), ("simulated", signal.SIGTERM),
        ("alone", signal.SIGUSR1),
    ],
)  # fmt: skip
def test_a_signal_stops_with_a_checkpoint_and_resume_ends_the_run(
    here: Path, environment: dict[str, str], mpirun: str, uninterrupted: dict[str, torch.Tensor], how: str,
    number: signal.Signals,
) -> None:  # fmt: skip
    """All ranks stop at one step, 75; --resume auto goes on, and the model is the uninterrupted run's to the bit."""
    job = start(command(how), environment)
    sent = time.monotonic()
    job.send_signal(number)
    code = job.wait(30)
    said = Path("stderr").read_text()
    assert code == STOPPED_EARLY, said
    assert time.monotonic() - sent < 20
    assert "with a checkpoint; go on with --resume runs/" in said and "Traceback" not in said
    folder = next((here / "runs").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["result"] == "stopped" and manifest["reason"].startswith("SIG")
    assert max((folder / "checkpoints").glob("*.h5")).name == f"step-{manifest['step']:08}.h5"
    ended = run(command(how, "--resume", "auto"), environment)
    assert ended.code == DONE, ended.stderr
    assert f"goes on from step {manifest['step']}, {folder.relative_to(here)}" in ended.stderr
    assert [f.name for f in (here / "runs").iterdir()] == [folder.name]
    if how != "alone":
        model = final(folder)
        assert all(torch.equal(model[k], uninterrupted[k]) for k in model)
    ended = run(command(how, "--resume", "auto", "--set", "run.steps=2"), environment)  # that one is done: a new one
    assert ended.code == DONE and len(list((here / "runs").iterdir())) == 2


def test_the_wall_time_stops_with_a_checkpoint(here: Path, environment: dict[str, str], mpirun: str) -> None:
    ended = run(command("-n", "--set", "run.stop_after=6s"), {**environment, "DAWDLE_S": "0.01"})
    assert ended.code == STOPPED_EARLY, ended.stderr
    assert "(run.stop_after), with a checkpoint" in ended.stderr


def test_a_run_that_was_killed_goes_on(
    here: Path,
    environment: dict[str, str],
    mpirun: str,
    uninterrupted: dict[str, torch.Tensor],
) -> None:
    """A rank gets SIGKILL twice; auto goes on from the last checkpoint; error.txt of the past is set aside."""
    for _ in range(2):
        job = start(
            command("-n", "--resume", "auto"),
            environment,
            "step  300" if not list(here.glob("runs/*")) else "step  800",
        )
        pids = json.loads(next(here.glob("runs/*/manifest.json")).read_text())["pid"]
        os.kill(pids, signal.SIGKILL)
        assert job.wait(30) == FAILED
    folder = next((here / "runs").iterdir())
    (folder / "error.txt").write_text("of the past")
    ended = run(command("-n", "--resume", str(folder)), environment)
    assert ended.code == DONE, ended.stderr
    assert (folder / "error-1.txt").read_text() == "of the past"
    model = final(folder)
    assert all(torch.equal(model[k], uninterrupted[k]) for k in model)
    steps = [r["step"] for r in lines(folder) if r["kind"] == "train"]
    assert steps == list(range(5, 1201, 5))


def test_kills(mpirun: str, tmp_path: Path) -> None:
    """The short form of benchmarks/kills.py: SIGKILL for one rank or all, while checkpoints are being written."""
    script = Path(__file__).parent.parent / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "4", "--steps", "60"], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kills"] == 4 and counted["models equal to the bit"] >= 1 and counted["checkpoints proved"] >= 4


def test_mistakes_with_resume(here: Path, environment: dict[str, str], mpirun: str) -> None:
    ended = run(command("-n", "--resume", "absent"), environment)
    assert ended.code == USAGE
    ended.told_once("no absent to go on from", "auto")
    ended = run(command("-n", "--allow-changed", "optimizer.lr"), environment)
    assert ended.code == USAGE
    ended.told_once("--resume, which is missing")
    ended = run(command("-n", "--set", "run.steps=5"), environment)
    folder = next((here / "runs").iterdir())
    ended = run(command("-n", "--resume", str(folder), "--set", "optimizer.lr=3"), environment)
    assert ended.code == USAGE
    ended.told_once("optimizer.lr was 0.1 and is 3.0", "--allow-changed optimizer.lr")
    newest = folder / "checkpoints" / "step-00000005.h5"
    newest.write_bytes(newest.read_bytes()[:-1])
    ended = run(command("-n", "--resume", str(folder)), environment)
    assert ended.code == FAILED
    ended.told_once("bytes, and was written with", "step-00000005.h5")
    assert unfinished(config.load("my.toml")) is None
