"""Handing a script to its scheduler: a job folder with the script and the configuration, and the job's id."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import SlowmoError
from .script import CONFIG, Job

SCRIPT, LOG = "job.sh", "job.jsonl"  # in the job's folder
SUBMIT_TIMEOUT_S = 60.0  # schedulers under load take their time


def command(job: Job, after: str = "") -> list[str]:
    """The words that submit job.sh, to be called in the job's folder; `after`: the id that it waits for."""
    scheduler = job.site.scheduler
    if scheduler == "none":
        return ["bash", SCRIPT]
    if scheduler == "slurm":
        return ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else []), SCRIPT]
    array = {"pbs": "-J", "torque": "-t"}[scheduler]
    return [
        "qsub", *(["-W", f"depend=afterany:{after}"] if after else []),
        *([array, f"1-{len(job.tasks)}"] if job.tasks else []), SCRIPT,
    ]  # fmt: skip


def submit(job: Job, script: str, config: str) -> Iterator[str]:
    """Write script and configuration into the job's folder, and submit: each id as soon as it is known. Without a
    scheduler run it, and never return. Raises: SlowmoError.
    """
    folder = Path(job.folder)
    words = command(job)
    if shutil.which(words[0]) is None:
        raise SlowmoError(
            f"There is no {words[0]} on this machine.",
            "Submit from a login node, or leave out --submit: the script then comes on stdout.",
        )
    try:
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(config, encoding="utf-8")
        (folder / SCRIPT).write_text(script, encoding="utf-8")
    except (OSError, UnicodeEncodeError) as error:  # the latter: a name that is no UTF-8
        raise SlowmoError(
            f"The job folder {folder} cannot be made: {error}.", "Type --set run.folder=FOLDER, or another run.name."
        ) from None
    if job.site.scheduler == "none":
        os.chdir(folder)
        os.execvp(words[0], words)  # in the foreground: signals are the script's
    number = ""
    for _ in range(job.chain):
        number = _hand_over(command(job, number), folder)
        yield number
        line = {
            "event": "submitted",
            "job": number,
            "scheduler": job.site.scheduler,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        try:
            with (folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise SlowmoError(
                f"Job {number} is queued, but {folder / LOG} cannot be written: {error.strerror}.",
                "`slowmo job status` will not know it by its id before it has begun.",
            ) from None


def _hand_over(words: list[str], folder: Path) -> str:
    """Run sbatch or qsub; the id it prints. Raises: SlowmoError with what it said."""
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SUBMIT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlowmoError(
            f"{words[0]} has not answered for {SUBMIT_TIMEOUT_S:.0f} s.",
            f"Look whether the job is queued; the script is {folder / SCRIPT}.",
        ) from None
    answer = done.stdout.strip()
    if done.returncode or not answer:
        said = " ".join((done.stderr or answer).split()) or f"exit code {done.returncode}"
        raise SlowmoError(
            f"{words[0]} refused the job: {said}",
            f"The script is {folder / SCRIPT}; mend the request or the site profile.",
        )
    return answer.splitlines()[-1].split(";")[0]  # sbatch --parsable says ID;CLUSTER on some sites
