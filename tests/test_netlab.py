"""The laboratory with a slow network, benchmarks/netlab.py: hosts are made, and nothing of them stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import SOON_S, marked

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "netlab.py"
HELLO = """
import socket
from mpi4py import MPI
comm = MPI.COMM_WORLD
lines = comm.gather(f"{comm.rank} {comm.size} {socket.gethostname()}")
if lines:
    print(*lines, sep=chr(10))
"""
FAIL = """
import os, time
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    os._exit(7)
time.sleep(60)
"""
WAIT = """
import time
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def netlab(mpirun: str) -> list[str]:
    """The command; skips where no network namespace can be made."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("there is no iproute2 here")
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespace can be made: {made.stderr.strip()}")
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return [sys.executable, str(SCRIPT), "--hosts", "2", "--mpirun", mpirun]


def traces(pid: int) -> list[Path]:
    """What of this process's labs is still there."""
    return [path for folder in ("/run/netns", tempfile.gettempdir()) for path in Path(folder).glob(f"slowmo-{pid}-*")]


def test_every_host_has_its_name_and_ranks_are_placed_host_by_host(
    netlab: list[str], environment: dict[str, str]
) -> None:
    command = [*netlab, "--ranks-per-host", "2", "--", sys.executable, "-c", HELLO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:4] == ["0 4 h1", "1 4 h1", "2 4 h2", "3 4 h2"]


def test_nothing_stays_of_a_program_that_fails(netlab: list[str], environment: dict[str, str]) -> None:
    command = [*netlab, "--", sys.executable, "-c", FAIL]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as lab:
        said = lab.communicate(timeout=60)[0]
    assert lab.returncode == 7, said
    assert not traces(lab.pid)
    assert not marked(f"SLOWMO_TEST={environment['SLOWMO_TEST']}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_of_a_lab_that_is_stopped(
    number: signal.Signals, netlab: list[str], environment: dict[str, str]
) -> None:
    command = [*netlab, "--", sys.executable, "-c", WAIT]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    ) as lab:  # fmt: skip
        assert lab.stdout is not None
        assert lab.stdout.readline() == b"ready\n"
        assert traces(lab.pid)
        lab.send_signal(number)
        assert lab.wait(SOON_S) == 128 + number
    assert not traces(lab.pid)
    assert not marked(f"SLOWMO_TEST={environment['SLOWMO_TEST']}")


def test_the_next_lab_removes_what_a_killed_one_has_left(netlab: list[str], environment: dict[str, str]) -> None:
    command = [*netlab, "--", sys.executable, "-c", WAIT]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline() == b"ready\n"
        lab.kill()
    assert traces(lab.pid)
    subprocess.run([*netlab[:2], "--clean"], env=environment, check=True, capture_output=True, timeout=60)
    assert not traces(lab.pid)
    deadline = time.monotonic() + SOON_S
    while left := marked(f"SLOWMO_TEST={environment['SLOWMO_TEST']}"):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "fast", "--check"], "netlab: 'fast' is no rate"),
        ([], "netlab: There is no program to run."),
        (["--env", "A", "--", "true"], "netlab: --env A has no value."),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(words: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 2


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import netlab

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as end:
        netlab.main(["--hosts", "2", "--", "true"])
    assert end.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "netlab: A lab needs root, to make network namespaces, and this is not root."
    assert "sudo" in second


def test_without_iproute2_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import netlab

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(netlab.UsageError, match="apt-get install iproute2"):
        netlab.requirements()
