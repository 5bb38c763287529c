"""Runs that are killed with SIGKILL again and again, and still end as if nothing had happened.

    python benchmarks/kills.py --kills 100

A training run on two ranks writes a checkpoint every few steps, asynchronously, of a model large enough that some part
of it is being written most of the time. At random moments one rank, or all ranks at once, get SIGKILL; then
`--resume auto` goes on. Checked each time: nothing hangs, and every checkpoint under its name is whole, to the last
byte. Checked when the run comes to its end at last: the model is the uninterrupted run's, to the bit.
Prints what was counted; ends with 1 at the first fault. The test suite runs a short form of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from slowmo_mpi.checkpoint.read import Checkpoint

LIMIT_S = 60  # from a kill to the end of all processes, and of a start to the first step
CONFIG = """
[run]
steps = {steps}
log_every = 10
[task]
name = "digits"
batch_size = 8
hidden = 20000
[optimizer]
lr = 0.01
momentum = 0.9
[base]
algorithm = "osgp"
[slowmo]
tau = 12
buffers = "maintain"
[checkpoint]
every = 3
keep = 3
layout = "{layout}"
"""
MARK = "SLOWMO_KILLS"


def ranks_of(folder: Path) -> list[int]:
    """The processes of the run's ranks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0")
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = (process / "cmdline").read_bytes().count(b"-n\0")
        except OSError:
            continue
        if marked and b"slowmo_mpi" in words and not parent:
            found.append(int(process.name))
    return found


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "slowmo_mpi", "train", "my.toml", "-n", "2", *words]


def final(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(next((folder / "runs").glob("*/model.pt")), weights_only=True)


def finished(folder: Path) -> bool:
    return any((folder / "runs").glob("*/model.pt"))


def prove(folder: Path) -> int:
    """Every checkpoint under its name is whole; how many there are."""
    files = sorted((folder / "runs").glob("*/checkpoints/step-*.h5"))
    for file in files:
        with Checkpoint(file) as checkpoint:
            checkpoint.prove()
    return len(files)


def life(folder: Path, environment: dict[str, str], draw: random.Random, counted: Counter[str]) -> None:
    """Start or go on, and kill at a random moment after the first step; or see it come to its end."""
    with open(folder / "stderr", "w") as stderr:
        job = subprocess.Popen(
            command("--resume", "auto"), cwd=folder, env=environment, stdin=subprocess.DEVNULL, stderr=stderr
        )
    started = time.monotonic()
    while "checkpoints every" not in (folder / "stderr").read_text() and job.poll() is None:
        assert time.monotonic() - started < LIMIT_S, "it does not start"
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 1.5))
    if job.poll() is not None:
        assert job.returncode == 0, (folder / "stderr").read_text()
        counted["ends"] += 1
        return
    ranks = ranks_of(folder)
    writing = any((folder / "runs").glob("*/checkpoints/*.part"))
    victims = [draw.choice(ranks)] if draw.random() < 0.5 and ranks else ranks
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
    killed = time.monotonic()
    try:
        job.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        job.kill()
        raise AssertionError(f"it hangs {LIMIT_S} s after a kill of {len(victims)} of {len(ranks)} ranks") from None
    while ranks_of(folder):
        assert time.monotonic() - killed < LIMIT_S, "a rank outlives its job"
        time.sleep(0.05)
    if job.returncode == 0:
        counted["ends"] += 1
        return
    counted["kills"] += 1
    counted["of one rank" if len(victims) == 1 else "of all ranks"] += 1
    counted["while a checkpoint was being written"] += writing
    counted["slowest end, ms"] = max(counted["slowest end, ms"], int(1e3 * (time.monotonic() - killed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=150, help="length of each run")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    draw, counted = random.Random(wanted.seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="slowmo-kills-") as place:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        config = CONFIG.format(steps=wanted.steps, layout=wanted.layout)
        whole = Path(place) / "whole"
        whole.mkdir()
        (whole / "my.toml").write_text(config)
        subprocess.run(command(), cwd=whole, env=environment, check=True, capture_output=True)
        while counted["kills"] < wanted.kills:
            folder = Path(place) / f"run-{counted['runs']}"
            folder.mkdir()
            (folder / "my.toml").write_text(config)
            counted["runs"] += 1
            while not finished(folder):
                lives = set((folder / "runs").glob("*")) if any((folder / "runs").glob("*/checkpoints/*.h5")) else None
                if counted["kills"] < wanted.kills:
                    life(folder, environment | {MARK: str(folder)}, draw, counted)
                else:
                    done = [*command("--resume", "auto")]
                    subprocess.run(done, cwd=folder, env=environment, check=True, capture_output=True)
                counted["checkpoints proved"] += prove(folder)
                assert lives in (None, set((folder / "runs").glob("*"))), "it started anew, though it had a checkpoint"
                print(json.dumps(counted), flush=True)
            a, b = final(whole), final(folder)
            assert all(torch.equal(a[k], b[k]) for k in a), "the model is not the uninterrupted run's"
            counted["models equal to the bit"] += 1
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
