"""The vote to stop: all ranks at the same step, soon, whatever the pace."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worlds import Real, Simulated

from slowmo_mpi.comm import Endpoint
from slowmo_mpi.stopping import Vote, Wish

EXAMPLE = Path(__file__).parent.parent / "examples" / "quadratic.toml"


def stops_at(comm: Endpoint, first: int, step_s: float) -> int:
    """The step at which all stop when the last rank's time is up after the third."""
    wish = Wish()
    vote = Vote(comm, wish, first)
    for step in range(first + 1, first + 100):
        time.sleep(step_s)
        if step == first + 3 and comm.rank == comm.size - 1:
            wish = vote._wish = Wish(after_s=0)
        if vote.result(step):
            break
    vote.close()
    return step


@pytest.mark.parametrize("world", ["simulated-2", "mpi-2"], indirect=True)
def test_a_stop_is_agreed_on_soon_from_the_first_steps_on(world: Real | Simulated) -> None:
    """Steps of 0.2 s: a vote each second or sooner, heard at the next. The first steps' pace is not known yet."""
    steps = world.run(stops_at, 7, 0.2)
    assert len(set(steps)) == 1
    assert steps[0] <= 7 + 3 + 2 * 5


def test_a_warning_that_comes_after_the_end_is_no_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "slowmo_mpi", "train", str(EXAMPLE), "--set", "run.steps=3"]
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    said = list(itertools.takewhile(lambda line: not line.startswith("run folder: "), child.stderr))
    while child.poll() is None:
        child.send_signal(signal.SIGUSR1)
        time.sleep(0.001)
    assert child.returncode == 0, "".join(said)
