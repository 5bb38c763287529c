"""Where the time goes from `slowmo train -n` to the end of the first step.

    python benchmarks/startup.py -n 4 --starts 7

Each start trains one step of Fashion-MNIST in a folder of its own; the phases are those that `slowmo train` prints and
keeps in manifest.json. First comes a start that is not counted, after which the files are in the page cache.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
SETTINGS = ("run.epochs=0", "run.steps=1", "checkpoint.every=0", "run.eval_every=100")
LIMIT_S = 300


def once(ranks: int, config: str, folder: Path) -> dict[str, list[float]]:
    """One start: phase -> the fastest and the slowest rank's seconds; "command": until the command has ended."""
    settings = [f"--set={setting}" for setting in (*SETTINGS, f"run.folder={folder}")]
    command = [sys.executable, "-P", "-m", "slowmo_mpi", "train", config, "-n", str(ranks), *settings]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    ended_s = time.perf_counter() - started
    (manifest,) = folder.glob("*/manifest.json")
    return {**json.loads(manifest.read_text(encoding="utf-8"))["start_s"], "command": [ended_s, ended_s]}


@click.command(help=__doc__.split("\n\n", 1)[0])
@click.option("-n", "--ranks", default=4, show_default=True)
@click.option("--starts", default=7, show_default=True)
@click.option("--config", default="examples/fashion-mnist.toml", show_default=True)
def main(ranks: int, starts: int, config: str) -> None:
    """Measure, and print a table in Markdown."""
    found = []
    for i in range(starts + 1):
        with tempfile.TemporaryDirectory() as folder:
            phases = once(ranks, config, Path(folder))
        click.echo(f"start {i}: {phases['all'][1]:.2f} s" + ("" if i else ", not counted"), err=True)
        found += [phases] if i else []
    click.echo(f"| {ranks} ranks, median of {starts} starts | fastest rank, s | slowest rank, s | slowest of all, s |")
    click.echo("|---|---|---|---|")
    names = {"all": "mpirun to the first step's end", "command": "the whole command"}
    for phase in found[0]:
        fast, slow = ([f[phase][i] for f in found] for i in (0, 1))
        row = f"{statistics.median(fast):.2f} | {statistics.median(slow):.2f} | {max(slow):.2f}"
        click.echo(f"| {names.get(phase, phase)} | {row} |")


if __name__ == "__main__":
    main()
