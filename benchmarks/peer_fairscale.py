"""A training step of ours beside fairscale's SlowMoDistributedDataParallel over gloo, on hosts with a slow network.

    pip install fairscale
    python benchmarks/netlab.py --hosts 4 --rate 1gbit -- python benchmarks/peer_fairscale.py

fairscale's SlowMo is written for GPUs; on a CPU it runs, unedited, once what it calls of torch.cuda does nothing. The
same model, data, optimizer and threads; blocks of `tau` steps alternate; medians of the slowest rank's times.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import nn

from slowmo_mpi import SGP, Communicator, Local, SlowMo
from slowmo_mpi.bench.gloo import gloo
from slowmo_mpi.bench.models import build

CLASSES = 10


@click.command()
@click.option("--tau", default=12, show_default=True)
@click.option("--batch", default=2, show_default=True, help="Samples per rank and step.")
@click.option("--image", default=16, show_default=True)
@click.option("--repeat", default=7, show_default=True)
def main(tau: int, batch: int, image: int, repeat: int) -> None:
    """Measure; a table and JSON on rank 0."""
    torch.set_num_threads(1)
    comm = Communicator()
    pretend_cuda()
    try:
        from fairscale.experimental.nn.data_parallel import SlowMoBaseAlgorithm, SlowMoDistributedDataParallel
    except ImportError as error:
        sys.exit(f"fairscale cannot be loaded ({error}): type `pip install fairscale`.")

    def ours(base: Any) -> Callable[[], None]:
        model, optimizer = start(image)
        settings: dict[str, Any] = {"tau": tau, "beta": 0.5, "sharded": True, "overlap": True, "buffers": "maintain"}
        worker = SlowMo(model, optimizer, comm, base, **settings)
        return lambda: train(comm, model, optimizer, worker.step, tau, batch, image)

    def theirs(base: Any) -> Callable[[], None]:
        model, optimizer = start(image)
        often = {"localsgd_frequency": tau} if base is SlowMoBaseAlgorithm.LOCALSGD else {}
        wrapped = SlowMoDistributedDataParallel(
            model, nprocs_per_node=1, broadcast_buffers=False, slowmo_base_algorithm=base, slowmo_frequency=tau, **often
        )

        def step() -> None:
            optimizer.step()
            wrapped.perform_slowmo(optimizer)

        return lambda: train(comm, wrapped, optimizer, step, tau, batch, image)

    with gloo(comm):
        ways = {
            "Local SGD + SlowMo, ours": ours(Local()),
            "Local SGD + SlowMo, fairscale": theirs(SlowMoBaseAlgorithm.LOCALSGD),
            "SGP + SlowMo, ours": ours(SGP("exponential")),
            "SGP + SlowMo, fairscale": theirs(SlowMoBaseAlgorithm.SGP),
        }
        for block in ways.values():
            block()  # warms it up
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeat):
            for way, block in ways.items():
                comm.barrier()
                start_s = time.perf_counter()
                block()
                taken[way].append(max(comm.gather(time.perf_counter() - start_s)) / tau)
    if comm.rank == 0:
        print(json.dumps(taken))
        print("| ResNet-18, ms per step | median | smallest | largest |\n|---|---|---|---|")
        for way, seconds in taken.items():
            ms = [1e3 * s for s in seconds]
            print(f"| {way} | {statistics.median(ms):.0f} | {min(ms):.0f} | {max(ms):.0f} |", flush=True)
    from mpi4py import MPI

    MPI.Finalize()
    os._exit(0)  # fairscale's gossip thread never ends


def pretend_cuda() -> None:
    """Make what fairscale calls of torch.cuda do nothing."""
    torch.cuda.synchronize = lambda *_: None
    stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
    torch.cuda.current_stream = torch.cuda.Stream = lambda *_, **__: stream
    torch.cuda.stream = lambda _: nullcontext()
    torch.cuda.current_device = lambda: "cpu"
    torch.Tensor.cuda = torch.Tensor.pin_memory = lambda self, *_, **__: self


def start(image: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same weights everywhere."""
    torch.manual_seed(0)
    model = build("resnet18", image, 0)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def train(
    comm: Communicator, model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Any], steps: int,
    batch: int, image: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(batch, 3, image, image, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        step()


if __name__ == "__main__":
    main()
