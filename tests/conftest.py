"""Fixtures: `world` (see worlds.py), parametrised as "simulated-N" or "mpi-N"."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from worlds import Real, Simulated

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
    from slowmo_mpi.errors import SlowmoError
    from slowmo_mpi.launch import find_mpirun

    try:
        find_mpirun()
    except SlowmoError as error:
        if os.environ.get("SLOWMO_CI"):
            raise
        pytest.skip(str(error))
    return worlds.setdefault(ranks, Real(ranks))


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
