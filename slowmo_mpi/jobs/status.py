"""How a job does: what its scheduler says, joined with what its folder holds. Missing tools are no error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import parse
from ..errors import SlowmoError, UsageError
from .submit import LOG

ASK_TIMEOUT_S = 20.0  # squeue under load takes its time; a status without it is still one
PBS_STATES = {
    "Q": "PENDING", "H": "HELD", "W": "PENDING", "R": "RUNNING", "E": "COMPLETING", "F": "ENDED", "C": "ENDED",
    "B": "RUNNING", "X": "ENDED", "S": "SUSPENDED", "T": "PENDING", "M": "MOVED",
}  # fmt: skip
GIVE = "Give the job folder that `slowmo job --submit` named."
ALIVE = ("RUNNING", "COMPLETING", "PENDING", "CONFIGURING", "SUSPENDED", "HELD", "REQUEUED")


@dataclass
class Status:
    """One job, or one task of an array. None where it cannot be known.

    state: the scheduler's, in Slurm's words. waiting: further jobs of the chain in the queue. left_s: of training, at
    the rate of its last lines. outcome: how the last attempt ended.
    """

    task: str
    folder: str
    job: str = ""
    state: str = ""
    elapsed: str = ""
    limit: str = ""
    reason: str = ""
    waiting: int = 0
    attempts: int = 0
    outcome: str = ""
    run: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    samples_per_s: float | None = None
    left_s: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None


def status(place: str) -> list[Status]:
    """Each task of the job that `place` is: a job folder, a run folder, or an id. Raises: UsageError."""
    folder = _find(place)
    parts = sorted((log.parent for log in folder.glob(f"*/{LOG}")), key=lambda f: (len(f.name), f.name))
    if not parts and not (folder / LOG).exists() and not (folder / "manifest.json").exists():
        raise UsageError(f"{folder} is the folder of no job and of no run.", GIVE)
    if not parts:
        return [_status(folder, "")]
    queued = [Status("others", str(folder), *a) for a in _ask(_lines(folder)) if a[1] == "PENDING"]
    return [*(_status(part, part.name) for part in parts), *queued]


def _find(place: str) -> Path:
    path = Path(place)
    if path.is_dir():
        return path.parent if not (path / LOG).exists() and (path.parent / LOG).exists() else path
    if re.fullmatch(r"[\w.\[\]-]+", place):
        for depth in ("*", "*/*", "*/*/*"):
            for log in Path().glob(f"{depth}/{LOG}"):
                ids = {str(line.get("job")) for line in _lines(log.parent)}
                if place in ids | {i.partition(".")[0] for i in ids}:  # PBS: 4711 is short for 4711.server
                    return log.parent
    raise UsageError(f"There is no folder {place}, and no job of this id below the working directory.", GIVE)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a job's log; one may be cut off where a node died."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def _status(folder: Path, task: str) -> Status:
    lines = _lines(folder)
    s = Status(task, str(folder))
    started = [line for line in lines if line.get("event") == "started"]
    s.attempts = len(started)
    if lines and lines[-1].get("event") == "ended":
        s.outcome = str(lines[-1].get("next", ""))
    ids = [str(line["job"]) for line in started or lines if "job" in line]
    s.job = ids[-1] if ids else ""
    answers = _ask(lines)
    # The job at work, else the one that began last, else the next in the queue.
    ranked = sorted(answers, key=lambda a: (a[1] in ("RUNNING", "COMPLETING"), a[0] == s.job, a[1] in ALIVE))
    if ranked:
        s.job, s.state, s.elapsed, s.limit, s.reason = ranked[-1]
        s.waiting = sum(a[1] == "PENDING" for a in ranked[:-1])
    _run(folder, s)
    return s


Answer = tuple[str, str, str, str, str]  # id, state, elapsed, limit, reason


def _ask(lines: list[dict[str, Any]]) -> list[Answer]:
    """What the scheduler knows of the ids in a job's log."""
    ids = list(dict.fromkeys(str(line["job"]) for line in lines if "job" in line))[-20:]
    scheduler = next((str(line["scheduler"]) for line in reversed(lines) if "scheduler" in line), "")
    if not ids:
        return []
    if scheduler == "slurm":
        return _slurm(ids)
    if scheduler in ("pbs", "torque"):
        return [answer for i in ids for answer in _pbs(i, finished=scheduler == "pbs")]
    return [_process(ids[-1], lines)] if scheduler == "none" else []


def _slurm(ids: list[str]) -> list[Answer]:
    queued = _run_tool(["squeue", "--noheader", f"--jobs={','.join(ids)}", "--format=%A|%T|%M|%l|%r"])
    answers = _answers(queued, ids)
    unknown = [i for i in ids if i not in {a[0] for a in answers}]
    if unknown:
        form = "--format=JobIDRaw,State,Elapsed,Timelimit,Reason"
        ended = _run_tool(
            ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(unknown)}", form]
        )  # fmt: skip
        answers += _answers(ended, unknown)
    return answers


def _answers(text: str, ids: list[str]) -> list[Answer]:
    """Of these jobs only: who asks for an array, whose number is one of its tasks' too, is told of every task."""
    rows = [line.strip().split("|") for line in text.splitlines() if line.count("|") == 4]
    return [
        (number, state.split(" ")[0], elapsed, limit, "" if reason == "None" else reason)
        for number, state, elapsed, limit, reason in rows if number in ids
    ]  # fmt: skip


def _pbs(number: str, finished: bool) -> list[Answer]:
    text = _run_tool(["qstat", *(["-x"] if finished else []), "-f", number])
    values: dict[str, str] = dict(re.findall(r"^\s+([\w.]+) = (.*)$", text, re.MULTILINE))
    state = values.get("job_state", "")
    if not state:
        return []
    used, limit = values.get("resources_used.walltime", ""), values.get("Resource_List.walltime", "")
    return [(number, PBS_STATES.get(state, state), used, limit, values.get("comment", ""))]


def _process(number: str, lines: list[dict[str, Any]]) -> Answer:
    """A job without a scheduler is a process of this machine."""
    ended = lines[-1].get("event") == "ended"
    alive = number.isdigit() and Path(f"/proc/{number}").exists()
    return number, "RUNNING" if alive and not ended else "ENDED", "", "", ""


def _run_tool(words: list[str]) -> str:
    """What a scheduler's command prints; nothing where it is missing, fails or does not answer."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=ASK_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _run(folder: Path, s: Status) -> None:
    """Fill in what the run folder says."""
    manifests = [m for m in (folder / "manifest.json", *folder.glob("*/manifest.json")) if m.is_file()]
    if manifests:
        run = max(manifests, key=lambda m: m.stat().st_mtime).parent
        s.run = str(run)
        _progress(run, s)
    paths = [*folder.glob("checkpoints/step-*.h5"), *folder.glob("*/checkpoints/step-*.h5")]
    found = [(int(p.stem[5:]), p) for p in paths if p.stem[5:].isdigit()]
    if found:
        s.checkpoint_step, newest = max(found)
        s.checkpoint_age_s = max(0.0, time.time() - newest.stat().st_mtime)


def _progress(run: Path, s: Status) -> None:
    try:
        config = parse((run / "config.toml").read_text(encoding="utf-8"))
        text = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except (OSError, SlowmoError):
        return
    records = []
    for line in text.splitlines()[-200:]:  # the rate is that of the end
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "train":
            records.append(record)
    s.steps = config.run.steps or None
    if not records:
        return
    last = records[-1]
    s.step, s.loss, s.samples_per_s = last["step"], last.get("loss"), last.get("samples_per_s")
    if not s.steps and last.get("epoch"):
        s.steps = round(last["step"] / last["epoch"] * config.run.epochs)
    first = records[-6] if len(records) > 5 else {"step": 0, "time_s": 0.0} if len(records) < 2 else records[0]
    if s.steps and last["step"] > first["step"]:
        rate = (last["time_s"] - first["time_s"]) / (last["step"] - first["step"])
        s.left_s = max(0.0, rate * (s.steps - last["step"]))
