"""What becomes of a run whose time limit is far too short, and of one that loses a node in mid-run.

    python benchmarks/requeue.py        (about eight minutes, root; see slurmlab.py)

Both are jobs of `slowmo job --submit` on four nodes under a real Slurm, and both are compared with a run of four
simulated ranks that nothing happens to: the model and all metrics but the times, bit for bit. A step takes at least
50 ms, so that the run of 1600 steps needs 80 s, of which a limit of one minute leaves 11 to 40.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from slurmlab import Cluster

from slowmo_mpi.errors import SlowmoError

LIMIT_S = 600  # of a story
TIMES = ("samples_per_s", "communication_share", "time_s")
TASK = """
import os, time
from slowmo_mpi.tasks.digits import digits


def make(context, *, hidden: int = 32):
    task = digits(context, hidden=hidden)
    loss, pause_s = task.loss, float(os.environ.get("PAUSE_S", 0))

    def paced(model, batch):
        time.sleep(pause_s)
        return loss(model, batch)

    task.loss = paced
    return task
"""
CONFIG = """
[run]
name = "digits"
steps = 1600
log_every = 100
eval_every = 400
[task]
name = "paced:make"
[optimizer]
lr = 0.05
momentum = 0.9
[base]
algorithm = "osgp"
[slowmo]
tau = 12
[checkpoint]
every = 100
"""
SITE = """
scheduler = "slurm"
launcher = "srun"
mpi = "pmix"
[environment]
OMP_NUM_THREADS = "1"
OMPI_MCA_pml = "ob1"
OMPI_MCA_btl = "tcp,self"
PAUSE_S = "0.05"
"""


class Story:
    """A job, from `slowmo job --submit` on."""

    def __init__(self, cluster: Cluster, place: Path, environment: Mapping[str, str], *words: str):
        words = ("job", "run.toml", "--site", "site.toml", "--nodes", "4", *words, "--submit")
        click.echo(f"$ slowmo {' '.join(words)}")
        before = set(place.glob("runs/*"))
        command = [sys.executable, "-m", "slowmo_mpi", *words]
        self.cluster, self.job = cluster, cluster.submit(command, cwd=place, env=environment)
        (self.folder,) = set(place.glob("runs/*")) - before

    def manifest(self) -> dict[str, Any]:
        with contextlib.suppress(StopIteration, ValueError):  # not there yet
            return json.loads(next(self.folder.glob("*/manifest.json")).read_text())
        return {}

    def at_step(self, step: int) -> None:
        """Wait for a checkpoint of this step."""
        deadline = time.monotonic() + LIMIT_S
        while not list(self.folder.glob(f"*/checkpoints/step-{step:08}.h5")):
            if time.monotonic() > deadline:
                raise SlowmoError(f"{LIMIT_S} s were not enough for {step} steps.", "")
            time.sleep(0.2)

    def tell(self, undisturbed: Path) -> bool:
        """Wait for the end, print what each attempt came to, and whether the run is the undisturbed one."""
        job = self.cluster.wait(self.job, limit_s=LIMIT_S)
        records = [json.loads(line) for line in (self.folder / "job.jsonl").read_text().splitlines()]
        lives = self.manifest()
        lives = [*lives.pop("lives", []), lives]
        click.echo(f"{'job':>4}  {'attempt':>7}  {'began':8}  {'ended':8}  {'steps':>12}  why it ended")
        for i, life in enumerate(lives, 1):
            begun, *ended = (r for r in records if r.get("attempt") == i)
            if ended:
                why = f"exit code {ended[0]['exit_code']}{', ' + life['reason'] if 'reason' in life else ''}"
                row = (
                    f"{ended[0]['time'][11:19]}  {begun['step']:>5} - {ended[0]['step']:<4}  {why}: {ended[0]['next']}"
                )
            else:
                row = f"{'-':8}  {begun['step']:>5} -       ended by Slurm, with all its processes"
            click.echo(f"{begun['job']:>4}  {i:>7}  {begun['time'][11:19]}  {row}; on {','.join(life['hosts'])}")
        log = "".join(path.read_text() for path in self.folder.glob("*.log"))
        for line in log.splitlines():
            if line.startswith(("job ", "goes on", "stopped", "done", "srun: error", "slurmstepd")):
                click.echo(f"  | {line.replace(str(self.folder), '...')}")
        same = job["JobState"] == "COMPLETED" and outcome(self.folder) == outcome(undisturbed)
        click.echo(f"job {self.job}: {job['JobState']}, requeued {job['Restarts']} times; ", nl=False)
        click.echo(f"model and metrics {'equal' if same else 'DIFFER from'} the undisturbed run's, bit for bit\n")
        return same


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The metrics but the times, and the model's bits."""
    (metrics,) = folder.glob("*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    model = torch.load(metrics.with_name("model.pt"), weights_only=True)
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records], {
        k: v.numpy().tobytes() for k, v in model.items()
    }


@click.command(help=__doc__.split("\n\n", 1)[0])
def main() -> None:
    with tempfile.TemporaryDirectory(prefix="requeue-") as name, Cluster(nodes=5) as cluster:
        place = Path(name)
        for file, text in (("paced.py", TASK), ("run.toml", CONFIG), ("site.toml", SITE)):
            (place / file).write_text(text)
        path = os.pathsep.join(p for p in (name, os.environ.get("PYTHONPATH")) if p)
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        undisturbed = place / "undisturbed"
        command = [sys.executable, "-m", "slowmo_mpi", "train", "run.toml", "--simulate", "4"]
        subprocess.run(
            [*command, "--set", f"run.folder={undisturbed}"],
            cwd=place, env={**os.environ, **environment}, stderr=subprocess.DEVNULL, check=True,
            timeout=LIMIT_S,
        )  # fmt: skip
        click.echo("# A time limit far too short\n")
        good = Story(cluster, place, environment, "--time", "1m").tell(undisturbed)
        click.echo("# A node that loses its power in mid-run; there is a spare one\n")
        story = Story(cluster, place, environment)
        story.at_step(600)
        click.echo(f"{time.strftime('%H:%M:%S')}: h3 is cut off, and all its processes are killed")
        cluster.power_off("h3")
        good = story.tell(undisturbed) and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
