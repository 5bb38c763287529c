"""Seconds of training until Fashion-MNIST's test accuracy is reached, on hosts with a slow network.

    python benchmarks/netlab.py --hosts 4 --rate 1gbit -- python benchmarks/time_to_accuracy.py

Every way trains the same model from the same weights on the same samples in the same order, at the same learning
rate; ways and seeds alternate. The clock stops while the average of the workers is evaluated, every 12 steps.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import nn

from slowmo_mpi import OSGP, AllReduce, Communicator, Local, SlowMo
from slowmo_mpi.bench.gloo import gloo
from slowmo_mpi.tasks import Context, build
from slowmo_mpi.tasks.sampler import Shards

EVERY = 12
OUTER: dict[str, Any] = {"tau": 12, "alpha": 1.0, "beta": 0.2, "buffers": "maintain"}
WAYS: dict[str, Callable[[], tuple[Any, dict[str, Any]]] | None] = {
    "ddp": None,
    "allreduce": lambda: (AllReduce(), {"tau": 0}),
    "local + SlowMo": lambda: (Local(), OUTER),
    "osgp + SlowMo": lambda: (OSGP("exponential"), OUTER),
    "osgp + SlowMo, bfloat16": lambda: (OSGP("exponential"), OUTER | {"wire": torch.bfloat16}),
}


@click.command()
@click.option("--target", default=0.85, show_default=True, help="Test accuracy.")
@click.option("--width", default=1024, show_default=True, help="Of the two hidden layers.")
@click.option("--batch", default=32, show_default=True, help="Samples per rank and step.")
@click.option("--lr", default=0.05, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--most-steps", default=600, show_default=True)
def main(target: float, width: int, batch: int, lr: float, seeds: int, most_steps: int) -> None:
    """Measure all ways; JSON and a table on rank 0."""
    torch.set_num_threads(1)
    comm = Communicator()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with gloo(comm):
        for seed in range(seeds):
            for way in WAYS:
                result = train(comm, way, target, width, batch, lr, seed, most_steps)
                found[way].append(result)
                if comm.rank == 0:
                    print(f"seed {seed}  {way:<24} {result}", flush=True)
    if comm.rank == 0:
        base = statistics.median(r["seconds"] for r in found["ddp"])
        print(json.dumps(found))
        print("| way | seconds to the target, median | of DDP's | steps | ms per step |\n|---|---|---|---|---|")
        for way, runs in found.items():
            seconds, steps = (statistics.median(r[k] for r in runs) for k in ("seconds", "steps"))
            print(f"| {way} | {seconds:.1f} | {seconds / base:.2f} | {steps:.0f} | {1e3 * seconds / steps:.1f} |")


def train(
    comm: Communicator, way: str, target: float, width: int, batch: int, lr: float, seed: int, most_steps: int
) -> dict[str, float]:
    """Seconds and steps until the target is reached (inf: it was not), and the last accuracy."""
    task = build("fashion-mnist", {}, Context(comm.rank, comm.size, seed, ""))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    made = WAYS[way]
    worker, network = None, model
    if made is None:
        network = nn.parallel.DistributedDataParallel(model)
    else:
        base, settings = made()
        worker = SlowMo(model, optimizer, comm, base, **settings)
    shards = Shards(len(task.train), comm.size, comm.rank, batch, seed)
    test = [task.test.batch(torch.arange(i, i + 500)) for i in range(comm.rank * 500, len(task.test), comm.size * 500)]
    seconds, accuracy, steps = 0.0, 0.0, 0
    while accuracy < target and steps < most_steps:
        comm.barrier()
        start = time.perf_counter()
        for step in range(steps, steps + EVERY):
            x, y = task.train.batch(shards.indices(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            worker.step() if worker else optimizer.step()
        seconds += max(comm.gather(time.perf_counter() - start))
        steps += EVERY
        if worker:
            with torch.no_grad(), worker.averaged():
                accuracy = evaluate(comm, model, test)
        else:
            accuracy = evaluate(comm, model, test)
    reached = accuracy >= target
    return {"seconds": seconds if reached else float("inf"), "steps": steps, "accuracy": round(accuracy, 4)}


@torch.no_grad()
def evaluate(comm: Communicator, model: nn.Module, test: list[Any]) -> float:
    """The accuracy on all test samples, each rank's share of them."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    total = comm.gather((right, sum(len(y) for _, y in test)))
    return sum(r for r, _ in total) / sum(n for _, n in total)


if __name__ == "__main__":
    main()
