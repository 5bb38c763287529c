"""The training loop: data, model, optimizer and worker put together from a configuration."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import bases, optim, saved, tasks
from .checkpoint.read import Checkpoint
from .checkpoints import Checkpoints
from .comm import Communicator, Endpoint
from .comm.mpi import library_version
from .config import Base, Config, Run, dump
from .errors import SlowmoError
from .flat import wire_type
from .resume import changes
from .runlog import RunLog, manifest
from .start import Start, line, ranges
from .stopping import Vote, Wish
from .tasks.sampler import Shards, share
from .team import ranks_of_a_node
from .trace import Trace
from .worker import SlowMo

EVALUATION_BATCH = 256

BASES: dict[str, Callable[[Base], bases.Base]] = {
    "allreduce": lambda c: bases.AllReduce(),
    "local": lambda c: bases.Local(),
    "dpsgd": lambda c: bases.DPSGD(c.topology),
    "sgp": lambda c: bases.SGP(c.topology),
    "osgp": lambda c: bases.OSGP(c.topology, c.delay),
}
"""The one place where an algorithm's name means something."""


class Show(Protocol):
    """Who shows a run while it goes on; called on rank 0 only."""

    def start(self, lines: list[str], first: int, steps: int) -> None:
        """What is about to run, from which step to which."""

    def advance(self, step: int) -> None:
        """`step` steps are done."""

    def note(self, text: str) -> None:
        """A line for people."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, as it is written."""

    def close(self) -> None:
        """The run has ended, well or not."""


@dataclass
class _Window:
    """What is summed up between two lines of metrics.jsonl."""

    losses: list[Tensor] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    sent_bytes: int = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        metrics = [{k: v.cpu() for k, v in m.items()} for m in self.metrics]
        elapsed_s = time.perf_counter() - self.started
        return {
            "losses": [x.cpu() for x in self.losses], "metrics": metrics, "elapsed_s": elapsed_s,
            "waited_s": self.waited_s, "sent_bytes": self.sent_bytes,
        }  # fmt: skip

    def take(self, saved: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state` gave."""
        self.losses = to_device(saved["losses"], device)
        self.metrics = to_device(saved["metrics"], device)
        self.started = time.perf_counter() - saved["elapsed_s"]
        self.waited_s, self.sent_bytes = saved["waited_s"], saved["sent_bytes"]


def train(
    config: Config,
    comm: Endpoint,
    folder: Path,
    show: Show | None = None,
    resume: Checkpoint | None = None,
    wish: Wish | None = None,
    trace: bool = False,
    start: Start | None = None,
) -> dict[str, Any]:
    """Train as `config` says, on all ranks together; the last evaluation, as in metrics.jsonl.

    folder: the run folder; rank 0 writes manifest.json, config.toml, metrics.jsonl, checkpoints and, at the end,
    model.pt: the averaged, de-biased model as a plain `state_dict`. Seeds torch's global generator.
    resume: go on from there. wish: asked whether to stop early; the result then has "stopped", the reason.
    trace: each rank writes trace/rank-N.json, its time line, for Perfetto. start: the phases of the start so far;
    told after the first step, and kept in the manifest.
    Raises: SlowmoError, among others when the loss is no longer a number.
    """
    run = config.run
    mark = start.mark if start is not None else lambda phase: None
    mark("run folder")
    threads = set_threads(run.threads, comm)
    torch.manual_seed(run.seed)  # the same initial weights everywhere
    context = tasks.Context(comm.rank, comm.size, run.seed, config.task.data)
    task = tasks.build(config.task.name, config.task.options, context)
    tasks.check_data(config.task.name, task)
    model = task.model.to(comm.device)
    mark("data and model")
    torch.manual_seed(run.seed * 1_000_003 + comm.rank + 1)  # dropout and the like differ by rank

    optimizer = optim.make(config.optimizer, [p for p in model.parameters() if p.requires_grad])
    slow, comm.allreduce = config.slowmo, config.comm.allreduce
    worker = SlowMo(
        model, optimizer, comm, BASES[config.base.algorithm](config.base), tau=slow.tau, alpha=slow.alpha,
        beta=slow.beta, buffers=slow.buffers, average=slow.average, gamma=slow.gamma, sharded=slow.sharded,
        overlap=slow.overlap, ranks_per_worker=config.run.ranks_per_worker() or ranks_of_a_node(comm),
        wire=wire_type(config.comm.dtype), progress=config.comm.progress,
    )  # fmt: skip
    checkpoints = Checkpoints(
        worker, folder / "checkpoints", keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every,
        layout=config.checkpoint.layout, asynchronous=config.checkpoint.write == "async", config=dump(config),
    )  # fmt: skip
    extra = _go_on(worker, task, config, resume) if resume else {}
    checkpoints.gave_up_later = resume is not None
    first = worker.state.step
    position = (first, *extra.get("data", (0, 0)))
    shards = Shards(len(task.train), comm.size, comm.rank, config.task.batch_size, run.seed, position)
    steps = run.steps or shards.steps(run.epochs)
    window, last = _Window(), extra.get("last", {})
    if extra and resume and resume.ranks == comm.size:
        window.take(extra["window"], comm.device)

    hosts = comm.gather(comm.host)
    log = None
    if comm.rank == 0:
        library = library_version() if isinstance(comm, Communicator) else f"simulated, {comm.size} ranks"
        log = RunLog(folder, config, manifest(library, hosts, threads), first if resume else None)
    if show is not None:
        lines = _introduction(config, worker, shards, steps, threads, folder) + _on_checkpoints(config, checkpoints)
        lines += comm.warnings
        show.start(lines + (_on_resume(resume, comm.size) if resume else []), first, steps)
    if resume:
        resume.close()

    mark("state")
    comm.trace = Trace(comm.rank) if trace else None
    started = time.perf_counter() - extra.get("elapsed_s", 0.0)
    stopped = ""
    vote = Vote(comm, wish or Wish(), first)
    try:
        for step in range(first, steps):
            time_now, end = (step, run.steps) if run.steps else (shards.time(step), run.epochs)
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(config.optimizer, time_now, end)
            waited, sent = comm.waited_s, comm.sent_bytes
            with comm.span("input and output", "batch"):
                batch = to_device(task.train.batch(shards.indices(step)), comm.device)
            with comm.span("computation", "forward"):
                loss, metrics = task.loss(model, batch)
            optimizer.zero_grad(set_to_none=False)  # gradients that are averaged stay where they are sent from
            with comm.span("computation", "backward"):
                loss.backward()
            worker.step()
            window.waited_s += comm.waited_s - waited
            window.sent_bytes += comm.sent_bytes - sent
            window.losses.append(loss.detach())
            window.metrics.append({k: v.detach() for k, v in metrics.items()})

            done = step + 1
            if show is not None:
                show.advance(done)
            records = []
            paused = time.perf_counter()
            if start is not None and step == first:
                _tell_start(start, comm, log, show)
            if done % run.log_every == 0 or done == steps:
                rate = optimizer.param_groups[0]["lr"]
                records.append({"kind": "train", **_sum_up(window, worker, config, done), "lr": rate})
                window = _Window()
            if _evaluates(run, shards, done, steps):
                last = {"kind": "eval", "step": done, **evaluate(task, worker)}
                records.append(last)
            for record in records:
                record |= {"epoch": shards.time(done), "time_s": time.perf_counter() - started}
                if log is not None:
                    log.write(record)
                if show is not None:
                    show.record(record)
            window.started += time.perf_counter() - max(paused, window.started)  # training's time alone
            stopped = vote.result(done) if done < steps else ""
            checkpoints.poll()
            every = config.checkpoint.every
            if stopped or (every and (done % every == 0 or done == steps)):
                elapsed = time.perf_counter() - started
                state = task.state_dict() if hasattr(task, "state_dict") else None
                checkpoints.save(
                    {"data": list(shards.at(done)), "window": window.state(), "last": last, "elapsed_s": elapsed,
                     "task": state}
                )  # fmt: skip
            if stopped:
                break
        vote.close()
        checkpoints.wait()
        if stopped:
            if log is not None:
                log.close(result="stopped", reason=stopped, step=done)
            return {**last, "stopped": stopped, "step": done}
        worker.drain()
        with worker.averaged():
            if comm.rank == 0:
                plain = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
                torch.save(plain, folder / "model.pt")
        if log is not None:
            log.close(result="done", steps=steps, final=last)
    finally:
        if comm.trace is not None:
            comm.trace.write(folder / "trace" / f"rank-{comm.rank}.json")
        if show is not None:
            show.close()
    return last


@torch.no_grad()
def evaluate(task: tasks.Task, worker: SlowMo) -> dict[str, float]:
    """Loss and metrics of the averaged model on the test samples, each rank its share, and the consensus distance.

    Changes nothing of the training's course. Without test samples only the consensus distance.
    """
    comm = worker.comm
    result = {"consensus": worker.consensus_distance()}
    if task.test is None:
        return result
    sums: dict[str, float] = {}
    count = 0
    with worker.averaged() as model:
        modes = [(module, module.training) for module in model.modules()]  # some may be in eval mode on purpose
        model.eval()
        mine = share(len(task.test), comm.size, comm.rank)
        for start in range(mine.start, mine.stop, EVALUATION_BATCH):
            indices = torch.arange(start, min(start + EVALUATION_BATCH, mine.stop))
            loss, metrics = task.loss(model, to_device(task.test.batch(indices), comm.device))
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
            count += len(indices)
        for module, training in modes:
            module.training = training
    everybody = comm.gather((sums, count))
    total = sum(n for _, n in everybody)
    names = dict.fromkeys(name for s, _ in everybody for name in s)
    return {name: math.fsum(s.get(name, 0.0) for s, _ in everybody) / total for name in names} | result


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or a tuple, list or dict of them, on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def set_threads(wanted: int, comm: Endpoint) -> int:
    """torch's threads for this rank: `wanted`, else OMP_NUM_THREADS, else the host's cores shared among its ranks.

    torch's own default, one thread per core in every rank, makes the ranks of a host fight for its cores. Ranks that
    the launcher bound to the same cores share those.
    """
    mine = (comm.host, tuple(sorted(os.sched_getaffinity(0))))
    sharers = comm.gather(mine).count(mine)  # simulated ranks take turns, but as many threads give the same bits
    if not wanted and not os.environ.get("OMP_NUM_THREADS", "").isdigit():
        wanted = max(1, len(mine[1]) // sharers)
    if wanted:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


def _sum_up(window: _Window, worker: SlowMo, config: Config, step: int) -> dict[str, Any]:
    """The window's means over steps and workers. Raises: SlowmoError on every rank if any loss is not finite."""
    comm = worker.comm
    losses = torch.stack(window.losses).double().cpu()
    bad = (~losses.isfinite()).nonzero()
    first_bad = step - len(losses) + int(bad[0]) + 1 if len(bad) else None
    names = sorted(window.metrics[0])
    means = [float(losses.mean())]
    means += [float(torch.stack([m[k].double() for m in window.metrics]).mean()) for k in names]
    elapsed = time.perf_counter() - window.started
    everybody = comm.gather((first_bad, means, window.waited_s / elapsed, window.sent_bytes / len(losses)))
    failed = [(b, r) for r, (b, *_) in enumerate(everybody) if b is not None]
    if failed:
        at, rank = min(failed)
        rate = worker.optimizer.param_groups[0]["lr"]
        raise SlowmoError(
            f"The loss became inf or nan at step {at} on rank {rank} (learning rate {rate:g}).",
            f"Type --set optimizer.lr={rate / 10:g}, or --set optimizer.warmup=...; the run folder has the metrics.",
        )
    mean = [math.fsum(values) / comm.size for values in zip(*(m for _, m, *_ in everybody), strict=True)]
    return {
        "step": step,
        **dict(zip(["loss", *names], mean, strict=True)),
        "samples_per_s": len(losses) * config.task.batch_size * comm.size / elapsed,
        "communication_share": math.fsum(c for *_, c, _ in everybody) / comm.size,
        "sent_bytes_per_step": math.fsum(b for *_, b in everybody) / comm.size,
        "consensus": worker.consensus_distance(),
    }


def _go_on(worker: SlowMo, task: tasks.Task, config: Config, resume: Checkpoint) -> dict[str, Any]:
    """Put worker and task where the checkpoint is; what the loop saved there.

    Optimizer settings that were changed on purpose are the new ones; another optimizer starts with empty buffers.
    """
    ours = {k.removeprefix("optimizer.") for k in changes(resume, config) if k.startswith("optimizer.")}
    groups = worker.optimizer.param_groups
    kept = [{k: v for k, v in g.items() if k in ours} for g in groups]
    extra = saved.load(worker, resume, optimizer="name" not in ours)
    for group, values in zip(groups, kept, strict=True):
        group.update(values)
    if resume.ranks != worker.comm.size:  # random streams of their own: those of the checkpoint are others'
        torch.manual_seed((config.run.seed * 1_000_003 + worker.comm.rank + 1) * 1_000_003 + resume.step)
    if extra.get("task") is not None:
        task.load_state_dict(extra["task"])  # type: ignore[attr-defined]
    return extra


def _evaluates(run: Run, shards: Shards, done: int, steps: int) -> bool:
    """Whether there is an evaluation after `done` steps."""
    if done == steps or (run.eval_every and done % run.eval_every == 0):
        return True
    return not run.eval_every and not run.steps and shards.at(done)[0] > shards.at(done - 1)[0]


def _tell_start(start: Start, comm: Endpoint, log: RunLog | None, show: Show | None) -> None:
    start.mark("first step")
    phases = ranges(comm.gather(start.seconds))
    if log is not None:
        log.note(start_s={phase: [round(s, 3) for s in span] for phase, span in phases.items()})
    if show is not None:
        show.note(line(phases))


def _introduction(config: Config, worker: SlowMo, shards: Shards, total: int, threads: int, folder: Path) -> list[str]:
    slow, run, comm = config.slowmo, config.run, worker.comm
    parameters = sum(e.numel for e in worker.state.flat.entries)
    gossip = config.base.algorithm not in ("allreduce", "local")
    graph = f" on {config.base.topology}" if gossip else ""
    outer = f"SlowMo tau {slow.tau}, alpha {slow.alpha:g}, beta {slow.beta:g}" if slow.tau else "no outer step"
    length = f"{run.steps} steps" if run.steps else f"{run.epochs} epochs of {shards.steps_per_epoch} steps"
    never = f"; tau exceeds the run's {total} steps, so there is no outer step" if slow.tau > total else ""
    simulated = "" if isinstance(comm, Communicator) else ", simulated"
    where = f"{comm.size} rank{'s' if comm.size > 1 else ''}{simulated}"
    if worker.team.ranks > 1:
        where += f", {worker.team.ranks} to a worker,"
    return [
        f"{config.task.name}: {parameters:,} parameters, {shards.samples:,} samples, {length}, "
        f"{config.task.batch_size} x {comm.size} samples per step",
        f"{config.base.algorithm}{graph}, {config.optimizer.name} lr {config.optimizer.lr:g}, {outer}{never}",
        f"{where} on {comm.device.type}, {threads} thread{'s' if threads > 1 else ''} each; run folder {folder}",
    ]


def _on_checkpoints(config: Config, checkpoints: Checkpoints) -> list[str]:
    every = f"every {config.checkpoint.every} steps" if config.checkpoint.every else "when stopped early"
    return [f"checkpoints {every}: {checkpoints.store.chosen}"]


def _on_resume(resume: Checkpoint, ranks: int) -> list[str]:
    lines = [f"goes on from step {resume.step}, {resume.path}"]
    if resume.ranks != ranks:
        lines.append(
            f"{ranks} ranks go on where {resume.ranks} left off: slow state shared out anew, all workers at their "
            "average, optimizer buffers averaged, push-sum weights 1, random streams new"
        )
    return lines
