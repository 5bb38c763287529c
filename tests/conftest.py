"""Fixtures: `world` (see worlds.py), parametrised as "simulated-N" or "mpi-N"."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from worlds import Real, Simulated

from slowmo_mpi.errors import SlowmoError
from slowmo_mpi.launch import find_mpirun

SOON_S = 25  # from a fault to the end of all processes

SIMULATED = [f"simulated-{n}" for n in (1, 2, 3, 4, 5, 8)]
REAL = [f"mpi-{n}" for n in (2, 3, 4)]


@pytest.fixture(scope="session")
def real_worlds() -> Iterator[dict[int, Real]]:
    worlds: dict[int, Real] = {}
    yield worlds
    for world in worlds.values():
        world.stop()


def real(worlds: dict[int, Real], ranks: int) -> Real:
    """The real world of this size; skips where there is no MPI, but in CI that is a failure."""
    try:
        find_mpirun()
    except SlowmoError as error:
        if os.environ.get("SLOWMO_CI"):
            raise
        pytest.skip(str(error))
    return worlds.setdefault(ranks, Real(ranks))


@pytest.fixture
def mpirun() -> str:
    """The launcher; without one a test skips, but in CI that is a failure."""
    try:
        return find_mpirun()
    except SlowmoError as error:
        if os.environ.get("SLOWMO_CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What the processes get, with a mark that finds them again. Afterwards none may be left."""
    mark = f"SLOWMO_TEST={tmp_path}"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    yield {**os.environ, **root, "OMP_NUM_THREADS": "1", "SLOWMO_TEST": str(tmp_path)}
    left = marked(mark)
    deadline = time.monotonic() + SOON_S
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = marked(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"left behind: {left}"


def marked(mark: str) -> dict[int, str]:
    """The processes with `mark` in their environment: pid -> command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found


@pytest.fixture
def world(request: pytest.FixtureRequest, real_worlds: dict[int, Real]) -> Simulated | Real:
    kind, ranks = request.param.split("-")
    return Simulated(int(ranks)) if kind == "simulated" else real(real_worlds, int(ranks))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `world` and names none runs in every world."""
    if "world" in metafunc.fixturenames and not any(
        "world" in mark.args[0].split(",") for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("world", SIMULATED + REAL, indirect=True)
