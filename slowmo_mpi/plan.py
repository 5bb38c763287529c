"""A dry run: what a configuration needs on so many ranks, without MPI, data or training."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import optim, tasks
from .comm import compressed
from .comm.collectives import bytes_sent
from .config import Config
from .errors import UsageError
from .flat import FlatParameters, travels_as, wire_type
from .topology import Topology, for_algorithm


@dataclass(frozen=True)
class Plan:
    """Per rank, unless said otherwise; `checkpoint_bytes` is a whole file, in mid-round.

    Bytes count payload, not headers; `*_bytes_per_step` are means over a round.
    """

    ranks: int
    parameters: int
    model_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    slow_bytes: int
    error_bytes: int
    cast_bytes: int
    message_bytes: int
    base_bytes_per_step: float
    outer_bytes_per_step: float
    allreduce_bytes_per_step: float
    steps: int | None
    rounds: int | None
    checkpoint_bytes: int
    topology: str | None
    spectral_gap: float | None
    steps_to_average: int | None

    @property
    def memory_bytes(self) -> int:
        """All of the above that stays in memory; activations come on top."""
        state = self.model_bytes + self.gradient_bytes + self.optimizer_bytes + self.slow_bytes
        return state + self.error_bytes + self.cast_bytes + self.message_bytes

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "memory_bytes": self.memory_bytes}


def plan(config: Config, ranks: int) -> Plan:
    """Build the model and one optimizer step's state, count everything. Raises: UsageError as `train` would."""
    team = config.run.ranks_per_worker()
    if team is None or ranks % team:
        raise UsageError(
            f"run.worker = {config.run.worker} does not say how {ranks} ranks make workers.",
            "Type --set run.worker=8 (a divisor of the ranks).",
        )
    workers = ranks // team
    graph = for_algorithm(config.base.algorithm, config.base.topology, workers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        context = tasks.Context(0, ranks, config.run.seed, config.task.data)
        task = tasks.build(config.task.name, config.task.options, context)
    model = copy.deepcopy(task.model)
    optimizer = optim.make(config.optimizer, [p for p in model.parameters() if p.requires_grad])
    flat = FlatParameters(model, [g["params"] for g in optimizer.param_groups], team)
    for p in flat.parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # on zero gradients: makes the optimizer show all of its buffers
    n = sum(z.numel() * z.element_size() for z in flat.buffers)
    wide = sum(z.numel() * max(4, z.element_size()) for z in flat.buffers)
    buffers = sum(b.numel() * max(4, b.element_size()) for b in model.buffers() if b.is_floating_point())
    slow = config.slowmo
    share = 1 if slow.average == "none" else ranks if slow.sharded else team
    inside = (team - 1) / team * n  # what puts a worker's parts together
    optimizer_bytes = sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    )
    received = max(len(graph.receives(k, 0)) for k in range(graph.period)) if graph else 0
    wire = wire_type(config.comm.dtype)
    elements = sum(z.numel() for z in flat.buffers)
    message = sum(z.numel() * travels_as(z.dtype, wire).itemsize for z in flat.buffers) // team
    exact = bool(slow.tau) and slow.average != "none"
    vectors = 3 if slow.average == "delayed" else 2  # anchor, slow momentum, a displacement on its way
    gradients = config.base.algorithm == "allreduce" and ranks > 1
    error_bytes = (exact * wide // team + gradients * wide) if wire else 0
    outer = 0.0
    if exact:
        mean = 2 * (workers - 1) / workers * wide / team if slow.sharded else bytes_sent(wide / team, workers)
        if wire:
            mean = compressed.bytes_sent(elements / team, workers, wire)
        others = [buffers, optimizer_bytes if slow.buffers == "average" else 0]
        outer = (mean + inside + sum(bytes_sent(size, ranks) for size in others)) / slow.tau
    steps = config.run.steps or _steps(config, task, ranks)
    return Plan(
        ranks=ranks,
        parameters=sum(e.numel for e in flat.entries),
        model_bytes=n,
        gradient_bytes=n,
        optimizer_bytes=optimizer_bytes,
        slow_bytes=vectors * wide // share if slow.tau else 0,
        error_bytes=error_bytes,
        cast_bytes=0 if config.compute.precision == "float32" else 2 * sum(e.numel for e in flat.entries),
        message_bytes=message * (1 + received) if graph else -(-2 * wide // ranks),
        base_bytes_per_step=_base_bytes(config, graph, n, message, elements, ranks, team),
        outer_bytes_per_step=outer,
        allreduce_bytes_per_step=bytes_sent(n, ranks),
        steps=steps,
        rounds=steps // slow.tau if steps and slow.tau else None,
        checkpoint_bytes=_checkpoint_bytes(
            config, ranks, n, message * team, optimizer_bytes, buffers, 2 * (vectors - 1) * wide if slow.tau else 0
        )
        + ranks * error_bytes,
        topology=config.base.topology if graph else None,
        spectral_gap=1 - graph.contraction if graph else None,
        steps_to_average=graph.steps_to_average() if graph else None,
    )


def _base_bytes(
    config: Config, graph: Topology | None, n: int, message: int, elements: int, ranks: int, team: int
) -> float:
    """What rank 0 sends per inner step, on average over a cycle of the graph and a round."""
    if config.base.algorithm == "allreduce":
        wire = wire_type(config.comm.dtype)
        return compressed.bytes_sent(elements, ranks, wire) if wire else bytes_sent(n, ranks)
    inside = bytes_sent(n, team)
    if graph is None:
        return inside
    peers = sum(len(graph.sends(k, 0)) for k in range(graph.period)) / graph.period
    slow = config.slowmo
    posted = 1.0 / max(1, config.base.delay) if config.base.algorithm == "osgp" else 1.0
    if slow.tau and slow.average != "none":  # exchanges that the exact average would undo are skipped
        delay = max(1, config.base.delay) if config.base.algorithm == "osgp" else 1
        posted = math.ceil((slow.tau - delay) / delay) / slow.tau if slow.tau > delay else 0.0
    return inside + (team - 1) / team * n + peers * posted * (message + 8)


def _checkpoint_bytes(
    config: Config, ranks: int, model: int, message: int, optimizer: int, buffers: int, slow: int
) -> int:
    """A row per rank of what differs between workers, and once what is the same on all."""
    rows = 1 if config.base.algorithm == "allreduce" else ranks
    slow_rows = ranks if config.slowmo.average == "none" else 1
    packet = message if config.base.algorithm == "osgp" and config.base.delay > 1 else 0
    return rows * (model + optimizer + packet) + ranks * buffers + slow_rows * slow


def _steps(config: Config, task: tasks.Task, ranks: int) -> int | None:
    """Steps in all, where the data is here to be counted."""
    from .errors import SlowmoError

    try:
        return config.run.epochs * (len(task.train) // (ranks * config.task.batch_size))
    except SlowmoError:
        return None
