"""Faults, from outside, with real processes: each ends soon, with one clear message and the documented exit code.

"-n" is `slowmo train -n 2`, which starts mpirun and tells its end in our words. "mpirun" is the user's own
`mpirun -n 2 slowmo train`: there mpirun prints a banner below our message, and ends with the rank's exit code (with
128 + the signal where a rank was killed by one, and with 1 after Ctrl-C: so Open MPI 5).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from slowmo_mpi.errors import FAILED, INTERRUPTED, USAGE
from slowmo_mpi.launch import _Stderr, _told, mpirun_command, mpirun_version

LIMIT_S = 120  # of a whole run, most of it the ranks' `import torch` on a busy machine
SOON_S = 25  # from a fault to the end of all processes

FAULTY = """
import os, pathlib, signal, time
import torch


class Noise:
    def __len__(self):
        return 1000

    def batch(self, indices):
        return torch.ones(len(indices), 4)


class Faulty:
    def __init__(self, fault, on, rank):
        self.fault, self.mine, self.steps = fault, on in (rank, -1), 0
        self.model, self.train, self.test = torch.nn.Linear(4, 1), Noise(), None

    def loss(self, model, batch):
        self.steps += 1
        if self.steps == 3 and self.mine and self.fault != "none":
            pathlib.Path("fault").touch()
            getattr(self, self.fault)()
        return model(batch).square().mean() + self.steps * 0, {}

    def error(self):
        raise ValueError("no such thing\\nin two lines")

    def torch_error(self):
        torch.zeros(3, 4) @ torch.zeros(3, 4)

    def leave(self):
        os._exit(7)

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def stuck(self):
        time.sleep(1000)

    def not_a_number(self):
        self.steps = float("nan")


def make(context, *, fault: str = "none", on: int = 1):
    return Faulty(fault, on, context.rank)
"""

CONFIG = """
[run]
steps = 1000000
log_every = 5
[task]
name = "faulty:make"
batch_size = 2
[slowmo]
tau = 4
"""

TRAIN = [sys.executable, "-m", "slowmo_mpi", "train"]


@dataclass
class Ended:
    """How a command ended; ended_s: seconds from the fault to the end."""

    code: int
    stdout: str
    stderr: str
    ended_s: float

    def told_once(self, *words: str) -> None:
        """Exactly one message, with these words, and no traceback."""
        assert len(re.findall(r"^slowmo: ", self.stderr, re.MULTILINE)) == 1, self.stderr
        assert "Traceback" not in self.stderr + self.stdout, self.stderr
        for word in words:
            assert word in self.stderr, self.stderr

    def without_banner(self) -> None:
        """Nothing that mpirun says of the end."""
        assert not re.search(r"prterun|mpirun|MPI_ABORT|-{20}", self.stderr), self.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with my.toml and the task faulty.py."""
    (tmp_path / "my.toml").write_text(CONFIG)
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(start: str, *arguments: str, config: str = "my.toml") -> list[str]:
    """slowmo train CONFIG ARGUMENTS on two ranks, started in one of the four ways (alone: on one)."""
    if start == "mpirun":
        return mpirun_command(2, [*TRAIN, config, *arguments])
    return [*TRAIN, config, *{"-n": ["-n", "2"], "simulated": ["--simulate", "2"], "alone": []}[start], *arguments]


def run(program: list[str], environment: dict[str, str]) -> Ended:
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, env=environment, check=False
    )
    fault = Path("fault")
    ended_s = time.time() - fault.stat().st_mtime if fault.exists() else 0.0
    assert ended_s < SOON_S
    said = done.stderr.replace("\0", "")  # prterun (Open MPI 5) ends what it says of MPI_ABORT with one
    return Ended(done.returncode, done.stdout, said, ended_s)


# ---- what is found before any rank is started ----
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent.toml", "-n", "2"], ["no configuration file absent.toml", "slowmo init"]),
        (["my.toml", "-n", "2", "--set", "slowmo.tua=3"], ["slowmo.tua", "Did you mean 'tau'?"]),
        (["my.toml", "-n", "2", "--set", "base.algorithm=local", "--set", "slowmo.average=none"], ["slowmo.average"]),
        (["my.toml", "-n", "3", "--set", "base.topology=hypercube"], ["hypercube", "3", "Use base"]),
        (["my.toml", "-n", "5000"], ["-n 5000", "limit", "--simulate 5000"]),
        (["my.toml", "-n", "2", "--simulate", "2"], ["exclude each other"]),
        (["my.toml", "-n", "two"], ["'two' is not a valid integer", "slowmo train --help"]),
    ],
)
def test_what_can_be_known_is_refused_before_mpi_starts(
    here: Path, environment: dict[str, str], mpirun: str, arguments: list[str], words: list[str]
) -> None:
    started = time.monotonic()
    ended = run([*TRAIN, *arguments], environment | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert time.monotonic() - started < SOON_S
    imported = {line.split("|")[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in imported and not imported & {"torch", "mpi4py"}
    assert ended.code == USAGE
    ended.told_once(*words)
    assert not (here / "runs").exists()


def test_more_ranks_than_the_allocation_has(here: Path, environment: dict[str, str], mpirun: str) -> None:
    """In a scheduler's job the launcher counts; here it sees the machine's cores."""
    if "Open MPI" not in mpirun_version(mpirun):
        pytest.skip("only Open MPI counts slots")
    ranks = (os.cpu_count() or 1) + 1
    ended = run([*TRAIN, "my.toml", "-n", str(ranks)], environment | {"LSB_JOBID": "1"})
    assert ended.code == USAGE
    ended.told_once(f"will not start {ranks} ranks", "Type -n")
    ended.without_banner()


# ---- what every rank meets ----
def test_an_error_of_all_ranks_is_told_once(here: Path, environment: dict[str, str], mpirun: str) -> None:
    """Under the user's own mpirun, before and after the ranks have joined."""
    ended = run(command("mpirun", "--set", "slowmo.tua=3"), environment)
    assert ended.code == USAGE
    ended.told_once("slowmo.tua")
    ended = run(command("mpirun", "--set", "task.on=-1", "--set", "task.fault=torch_error"), environment)
    assert ended.code == FAILED
    ended.told_once("RuntimeError: mat1 and mat2 shapes cannot be multiplied", "faulty.py, line", "in torch_error")


def test_an_unknown_key_of_the_task_is_found_by_the_ranks(here: Path, environment: dict[str, str], mpirun: str) -> None:
    ended = run(command("-n", "--set", "task.colour=3"), environment)
    assert ended.code == USAGE
    ended.told_once("task.colour", "fault, on")
    ended.without_banner()


@pytest.mark.parametrize("start, fault", [("-n", "absent"), ("simulated", "damaged")])
def test_data_that_is_missing_or_damaged(
    here: Path, environment: dict[str, str], mpirun: str, start: str, fault: str
) -> None:
    if fault == "damaged":
        (here / "data").mkdir()
        for split in ("train", "t10k"):
            (here / "data" / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x1c" * 3 + b"short")
            (here / "data" / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + b"\0\0\0\x1c")
    (here / "images.toml").write_text('[run]\nsteps = 2\n[task]\nname = "fashion-mnist"\ndata = "data"\n')
    ended = run(command(start, config="images.toml"), environment)
    assert ended.code == FAILED
    ended.told_once("data", "apt-get install", "is cut short" if fault == "damaged" else "There is no folder data")


def test_a_loss_that_is_no_number(here: Path, environment: dict[str, str], mpirun: str) -> None:
    ended = run(command("-n", "--set", "task.fault=not_a_number"), environment)
    assert ended.code == FAILED
    ended.told_once("loss became inf or nan at step 3 on rank 1", "optimizer.lr")
    ended.without_banner()


@pytest.mark.parametrize("start", ["-n", "alone"])
def test_a_folder_for_runs_that_cannot_be_made(
    here: Path, environment: dict[str, str], mpirun: str, start: str
) -> None:
    """Rank 0 meets this one alone."""
    (here / "runs").write_text("a file")
    ended = run(command(start), environment)
    assert ended.code == FAILED
    ended.told_once("run folder cannot be made in runs", "--set run.folder")


# ---- what one rank meets ----
@pytest.mark.parametrize("start", ["-n", "mpirun", "simulated", "alone"])
def test_a_task_that_raises(here: Path, environment: dict[str, str], mpirun: str, start: str) -> None:
    on = "0" if start == "alone" else "1"
    ended = run(command(start, "--set", "task.fault=error", "--set", f"task.on={on}"), environment)
    assert ended.code == FAILED
    line = FAULTY.splitlines().index('        raise ValueError("no such thing\\nin two lines")') + 1
    who = "The run" if start == "alone" else "Rank 1 of 2"
    ended.told_once(f"{who} failed: ValueError: no such thing in two lines ({here}/faulty.py, line {line}, in error).")
    report = re.search(r"traceback is in (\S+error\.txt)", ended.stderr)
    assert report is not None
    assert "Traceback" in Path(report[1]).read_text()
    if start != "mpirun":
        ended.without_banner()


@pytest.mark.parametrize("start", ["-n", "mpirun"])
def test_a_rank_that_is_killed(here: Path, environment: dict[str, str], mpirun: str, start: str) -> None:
    ended = run(command(start, "--set", "task.fault=killed"), environment)
    assert "Traceback" not in ended.stderr
    if start == "mpirun":
        assert ended.code != 0
    elif "Open MPI" in mpirun_version(mpirun):
        assert ended.code == FAILED
        ended.told_once("Rank 1 of 2 was killed by signal 9 (SIGKILL)", "memory")
        ended.without_banner()


def test_a_rank_that_leaves(here: Path, environment: dict[str, str], mpirun: str) -> None:
    ended = run(command("-n", "--set", "task.fault=leave"), environment)
    assert ended.code == FAILED
    ended.told_once()
    if "Open MPI" in mpirun_version(mpirun):
        ended.told_once("Rank 1 of 2 ended before the others")
        ended.without_banner()


def test_a_rank_that_is_stuck(here: Path, environment: dict[str, str], mpirun: str) -> None:
    ended = run(command("-n", "--set", "task.fault=stuck", "--set", "comm.timeout=3"), environment)
    assert ended.code == FAILED
    assert ended.ended_s >= 3
    ended.told_once("Rank 0 on ", "waited ", "s for rank 1 at step 2: gossip exchange", "comm.timeout")
    ended.without_banner()


def test_an_error_of_one_rank_before_mpi(here: Path, environment: dict[str, str], mpirun: str) -> None:
    """A file that is missing on one host: that rank tells it, and nobody waits for it in MPI_Init."""
    which = "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"
    (here / "of-rank-0.toml").write_text(CONFIG)
    ended = run(mpirun_command(2, ["sh", "-c", f"exec {shlex.join(TRAIN)} of-rank-{which}.toml"]), environment)
    assert ended.code == USAGE
    ended.told_once("no configuration file of-rank-1.toml")


def test_copies_that_another_mpis_launcher_started(here: Path, environment: dict[str, str], mpirun: str) -> None:
    """Each is alone in MPI; without a check each would train alone and report success."""
    other = "PMI_{}" if "Open MPI" in mpirun_version(mpirun) else "MV2_COMM_WORLD_{}"
    copies = [
        subprocess.Popen(
            command("alone"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | {other.format("SIZE"): "2", other.format("RANK"): str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [copy.communicate(timeout=LIMIT_S)[1] for copy in copies]
    assert [copy.returncode for copy in copies] == [USAGE, USAGE]
    ended = Ended(USAGE, "", "".join(said), 0.0)
    ended.told_once("started 2 processes", "each is alone", "another MPI", "slowmo train -n N")
    assert "RuntimeWarning" not in ended.stderr


# ---- what is done to it from outside ----
@pytest.mark.parametrize(
    "start, number, victim, code",
    [
        ("-n", signal.SIGINT, "starter", INTERRUPTED),
        ("-n", signal.SIGKILL, "starter", -signal.SIGKILL),
        ("-n", signal.SIGKILL, "mpirun", FAILED),
        ("simulated", signal.SIGINT, "starter", INTERRUPTED),
        ("alone", signal.SIGINT, "starter", INTERRUPTED),
    ],
)
def test_a_signal_ends_all_ranks(
    here: Path, environment: dict[str, str], mpirun: str, start: str, number: signal.Signals, victim: str, code: int
) -> None:
    """Ctrl-C, or a starter killed: no traceback, and (see `environment`) no process is left."""
    with open("stderr", "w") as stderr:
        starter = subprocess.Popen(
            command(start), env=environment, stdin=subprocess.DEVNULL, stderr=stderr,
            start_new_session=True,  # as a shell does, so that a Ctrl-C reaches the whole group
            # A test run in the background of a script has SIGINT ignored, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    said = Path("stderr")
    deadline = time.monotonic() + LIMIT_S
    while "step " not in said.read_text() and starter.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert starter.poll() is None, said.read_text()
    if victim == "mpirun":
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
        os.kill(int(children[0]), number)
    elif number == signal.SIGINT:
        os.killpg(starter.pid, number)
    else:
        os.kill(starter.pid, number)
    assert starter.wait(SOON_S) == code
    assert "Traceback" not in said.read_text()
    assert said.read_text().count("slowmo: ") == (1 if victim == "mpirun" else 0)


# ---- mpirun's words in ours ----
BANNER = "-" * 74 + "\n{}\n" + "-" * 74 + "\n"
KILLED = "prterun noticed that process rank 3 with PID 0 on node vm exited on\nsignal 9 (Killed)."
KILLED_4 = "mpirun noticed that process rank 3 with PID 0 on node vm exited on signal 9 (Killed)."
STATUS = (
    "prterun detected that one or more processes exited with non-zero status,\nthus causing the job to be terminated. "
    "The first process to do so was:\n\n   Process name: [prterun-vm-1@1,3]\n   Exit code:    7"
)
STATUS_4 = STATUS.replace("prterun", "mpirun").replace("[mpirun-vm-1@1,3]", "[[123,1],3]")


@pytest.mark.parametrize(
    "banner, words",
    [
        (KILLED, "Rank 3 of 4 was killed by signal 9 (SIGKILL)"),
        (KILLED_4, "Rank 3 of 4 was killed by signal 9 (SIGKILL)"),
        (KILLED.replace("9 (Killed)", "11 (Segmentation fault)"), "signal 11 (SIGSEGV)"),
        (STATUS, "Rank 3 of 4 ended before the others without a word (exit code 7)"),
        (STATUS_4, "Rank 3 of 4 ended before the others without a word (exit code 7)"),
        ("There are not enough slots available in the system to\nsatisfy the 4 slots", "will not start 4 ranks"),
    ],
)
def test_banners_are_told_in_our_words(banner: str, words: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    stderr = _Stderr()
    text = ("step 1/4\n" + BANNER.format(banner)).encode()
    for i in range(0, len(text), 7):  # however it is cut on its way
        stderr.feed(text[i : i + 7])
    stderr.finish()
    assert capfdbinary.readouterr().err == b"step 1/4\n"
    assert words in str(_told(stderr.banners, 1, 4))


def test_an_end_that_is_not_understood_is_passed_on() -> None:
    assert "exit code 9: what mpirun said" in str(_told("what mpirun said", 9, 4))
    assert "signal 9 (SIGKILL)" in str(_told("", -9, 4))


@pytest.mark.parametrize(
    "given, passed, spoken",
    [
        ("a\nb", "a\nb\n", False),
        ("\0slowmo: it is wrong\n\0", "slowmo: it is wrong\n", True),
        (BANNER.format("Primary job  terminated normally, but 1 process returned\na non-zero exit code."), "", False),
        (BANNER.format("WARNING: a library is old"), BANNER.format("WARNING: a library is old"), False),
        ("-" * 74 + "\na user's table\n", "-" * 74 + "\na user's table\n", False),
        ("-" * 30 + "\na user's table\n", "-" * 30 + "\na user's table\n", False),
        ("[vm:12] *** Process received signal ***\n[vm:12] [ 0] /lib/libc.so\nx\n", "x\n", False),
        ("[W1122 17:15:13.330 socket.cpp:464] torch's warning\n", None, False),
        (
            "  3%|#  | 1/9\r 50%|## | 5/9\rslowmo: oh\n 60%|## | 6/9\r",
            "  3%|#  | 1/9\r 50%|## | 5/9\rslowmo: oh\n",
            True,
        ),
    ],
)
def test_only_what_mpirun_says_of_the_end_is_kept_back(
    given: str, passed: str | None, spoken: bool, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    stderr = _Stderr()
    stderr.feed(given.encode())
    stderr.finish()
    assert capfdbinary.readouterr().err.decode() == (given if passed is None else passed)
    assert stderr.spoken == spoken
