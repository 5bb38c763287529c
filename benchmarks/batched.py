"""compute.vmap against ranks that take turns: samples per second of simulated runs, by model and number of ranks.

    python benchmarks/batched.py [--repeats 3]

A B A B, medians; one thread. SGP + SlowMo, 16 samples per rank and step; the first steps of a run are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from slowmo_mpi import config, simulate
from slowmo_mpi.train import train

STEPS = 40
MODELS = {
    "perceptron on digits (4,810 parameters)": "digits",
    "small ResNet on Fashion-MNIST (studies.py)": "study_tasks:fashion",
    "network of `slowmo init fashion-mnist`": "fashion-mnist",
}


def samples_per_s(task: str, ranks: int, vmap: bool) -> float:
    """Of the second half of a run."""
    text = f"""
        run = {{ steps = {STEPS}, log_every = {STEPS // 2} }}
        task = {{ name = "{task}", batch_size = 16 }}
        optimizer = {{ lr = 0.05, momentum = 0.9 }}
        slowmo = {{ tau = 12 }}
        compute = {{ vmap = {str(vmap).lower()} }}
    """
    with tempfile.TemporaryDirectory() as folder:
        simulate(ranks, lambda comm: train(config.parse(text, "batched.py"), comm, Path(folder)))
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return float([r for r in records if r["kind"] == "train"][-1]["samples_per_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    print("| model | ranks | in turns, samples/s | in one vmap, samples/s | ratio |\n|---|---|---|---|---|")
    for label, task in MODELS.items():
        for ranks in (4, 8, 16, 32):
            pairs = [(samples_per_s(task, ranks, False), samples_per_s(task, ranks, True)) for _ in range(repeats)]
            turns, one = (statistics.median(p[i] for p in pairs) for i in (0, 1))
            ratio = statistics.median(b / a for a, b in pairs)
            print(f"| {label} | {ranks} | {turns:,.0f} | {one:,.0f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
