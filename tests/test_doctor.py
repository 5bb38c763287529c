"""slowmo doctor: what it says of this machine, of hosts with a slow or a broken link, and of tables made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_netlab import SCRIPT, netlab  # noqa: F401

from slowmo_mpi.cli.doctor import _Report
from slowmo_mpi.comm.launcher import Watchdog
from slowmo_mpi.doctor import wire
from slowmo_mpi.doctor.checks import FAULT, OK, WARNING, Check, conclude, differences
from slowmo_mpi.doctor.links import judge
from slowmo_mpi.errors import DONE, FAULT_FOUND
from slowmo_mpi.launch import mpirun_command

DOCTOR = [sys.executable, "-P", "-m", "slowmo_mpi", "doctor"]
NAMES = ["reach", "versions", "ranks", "sums", "CUDA-aware MPI", "links", "clocks", "limits", "scratch", "this folder",
         "parallel HDF5"]  # fmt: skip


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )


def by_name(report: str) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(report)["checks"]}


# ---- this machine ----
def test_alone_it_starts_two_ranks(
    mpirun: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(DOCTOR, environment)
    assert done.returncode == DONE, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line[9:24].strip() for line in lines if line[0] != " "] == ["launcher", *NAMES]
    assert "2 ranks on 1 host" in done.stdout and done.stderr.startswith("ready: 0 faults")
    assert not list(tmp_path.iterdir())


def test_under_mpirun_it_examines_those_ranks(
    mpirun: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(mpirun_command(3, [*DOCTOR, "--json"]), environment)
    assert done.returncode == DONE, done.stdout + done.stderr
    checks = by_name(done.stdout)
    assert json.loads(done.stdout)["ready"] and list(checks) == NAMES
    ranks = checks["ranks"]["data"]
    assert [(rank["rank"], rank["local_rank"], rank["local_size"]) for rank in ranks] == [
        (0, 0, 3),
        (1, 1, 3),
        (2, 2, 3),
    ]
    assert all(rank["claim"]["size"] == 3 and rank["threads"] == 1 and rank["cores"] for rank in ranks)
    versions = next(iter(checks["versions"]["data"].values()))
    assert {"slowmo-mpi", "MPI", "Python", "torch", "numpy", "mpi4py", "h5py"} < set(versions)


NO_SPACE = """
import sys, tempfile
from slowmo_mpi import cli
from slowmo_mpi.comm.launcher import launched
if launched().rank == 1:
    from slowmo_mpi.doctor import storage
    def broken():
        raise OSError("libhdf5.so: no such file\\nor directory")
    storage._h5py = broken
cli.main(["doctor"])
"""


def test_a_fault_of_one_rank_names_it(
    mpirun: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(mpirun_command(2, [sys.executable, "-c", NO_SPACE]), environment)
    assert done.returncode != DONE
    assert (
        "fault    parallel HDF5   h5py cannot be loaded on rank 1: OSError: libhdf5.so: no such file or dir"
        in done.stdout
    )
    assert "not ready: 1 fault" in done.stderr and "Traceback" not in done.stderr


def test_without_a_launcher_it_says_so(environment: dict[str, str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    code = "import sys; sys.executable = sys.argv.pop(1); from slowmo_mpi import cli; cli.main(['doctor'])"
    done = run([sys.executable, "-c", code, str(python)], environment | {"PATH": str(tmp_path)})
    assert done.returncode == FAULT_FOUND
    assert done.stderr.startswith("slowmo: There is no mpirun") and done.stderr.count("\n") == 2


# ---- hosts of the laboratory ----
LAB = """
import sys
sys.path.insert(0, {folder!r})
import netlab

with netlab.Lab(hosts=4, rate="200mbit") as lab:
    switch = f"{{lab.name}}-switch"
    if {what!r} == "slow":
        for place, device in ((f"{{lab.name}}-h3", netlab.INTERFACE), (switch, "h3")):
            netlab._batch(["tc", "-n", place], [netlab._limit(device, 20_000_000, "replace")])
    if {what!r} == "apart":  # the switch hands nothing on between two isolated ports, and nobody is told
        netlab._batch(["ip", "-n", switch], [f"link set h{{k}} type bridge_slave isolated on" for k in (2, 4)])
        for k, other in ((2, 4), (4, 2)):
            there = f"neigh replace {{lab.addresses[other - 1]}} lladdr 02:00:00:00:00:01 dev {{netlab.INTERFACE}}"
            netlab._batch(["ip", "-n", f"{{lab.name}}-h{{k}}"], [there])
    sys.exit(lab.run({command!r}, mpirun={mpirun!r}, timeout=100).returncode)
"""


def in_the_lab(what: str, mpirun: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Doctor on four hosts; in a process of its own, since a lab listens to signals."""
    code = LAB.format(folder=str(SCRIPT.parent), what=what, command=[*DOCTOR, "--json"], mpirun=mpirun)
    return run([sys.executable, "-c", code], environment)


@pytest.mark.usefixtures("netlab")
def test_the_host_with_a_slow_link_is_named(
    mpirun: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = in_the_lab("slow", mpirun, environment)
    assert done.returncode != DONE  # 3, unless mpirun stumbles on four ranks that end with it at once
    checks = by_name(done.stdout)
    assert {name: c["result"] for name, c in checks.items() if c["result"] == FAULT} == {"links": FAULT}, done.stdout
    links = checks["links"]
    assert links["found"].startswith("h3 is slow: sends ")
    assert set(links["data"]) == {"h1", "h2", "h3", "h4"}
    rates = {host: min(found["sends"], found["receives"]) for host, found in links["data"].items()}
    assert rates.pop("h3") < 0.5 * min(rates.values())  # a busy machine may bring a warning about another one, no more


@pytest.mark.usefixtures("netlab")
def test_hosts_that_do_not_reach_each_other_are_named(
    mpirun: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = in_the_lab("apart", mpirun, environment)
    assert done.returncode != DONE
    assert by_name(done.stdout)["reach"]["found"] == "1 pair of hosts cannot exchange a message: h2 and h4"
    assert not json.loads(done.stdout)["ready"]


# ---- the parts ----
def test_nothing_is_ready_before_the_last_check(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where what has started the ranks is a line of its own."""
    with Watchdog() as watchdog:
        report = _Report(0, False, watchdog)
        for name in ["launcher", *NAMES[:-1]]:
            report.add(Check(name, conclude("fine")))
        assert report.end() == FAULT_FOUND
        report.add(Check(NAMES[-1], conclude("fine")))
        assert report.end(whole=True) == DONE
    assert capsys.readouterr().err.splitlines() == ["not ready: 0 faults, 0 warnings", "ready: 0 faults, 0 warnings"]


@pytest.mark.parametrize("players", [1, 2, 3, 4, 5, 8, 9])
def test_in_a_tournament_everybody_meets_everybody_once(players: int) -> None:
    met = []
    for turn in range(wire.turns(players)):
        partners = [wire.partner(me, turn, players) for me in range(players)]
        assert all(partner is None or partners[partner] == me != partner for me, partner in enumerate(partners))
        met += [(me, partner) for me, partner in enumerate(partners) if partner is not None and me < partner]
    assert sorted(met) == [(a, b) for a in range(players) for b in range(a + 1, players)]


def links(**slow: tuple[float, float, float]) -> dict[str, dict[str, float]]:
    usual = {f"n{k}": (1.0, 1.0, 1.0) for k in range(5)}
    return {
        host: {"sends": 1e9 * sends, "receives": 1e9 * receives, "latency_s": 1e-5 * late}
        for host, (sends, receives, late) in (usual | slow).items()
    }


@pytest.mark.parametrize(
    ("found", "result", "words"),
    [
        (links(), OK, "none below 0.7 of the median"),
        (links(n3=(0.6, 1, 1)), WARNING, "n3 is slow: sends 600 MB/s, 0.60 of the median"),
        (links(n3=(1, 0.1, 1)), FAULT, "n3 is slow: receives 100 MB/s, 0.10 of the median"),
        (links(n2=(0.2, 0.2, 1)), FAULT, "n2 is slow: sends 200 MB/s, 0.20 of the median; receives 200 MB/s"),
        (links(n1=(1, 1, 8)), WARNING, "n1 is late: 80 us, 8 times the median"),
        (dict(list(links(n1=(0.1, 0.1, 1)).items())[:2]), OK, "2 hosts send 550 MB/s"),
    ],
)
def test_the_slow_host_is_told_from_the_others(found: dict[str, dict[str, float]], result: str, words: str) -> None:
    finding = judge(found)
    assert finding.result == result
    assert words in finding.found
    assert sum(" is slow: " in line for line in finding.more) == 0


def test_versions_that_differ_are_told_with_their_hosts() -> None:
    assert differences("torch", {"n1": "2.13.0", "n2": "2.13.0"}) == ""
    told = differences("torch", {"n1": "2.13.0", "n2": "2.12.0", "n3": "2.13.0"})
    assert told == "torch is 2.13.0 on n[1,3] but 2.12.0 on n2"
    finding = conclude("fine", ["a fault"], ["a warning"])
    assert (finding.result, finding.found, finding.more) == (FAULT, "a fault", ["a warning", "fine"])
