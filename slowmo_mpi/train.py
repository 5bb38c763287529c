"""The training loop: data, model, optimizer and worker put together from a configuration."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
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
from .evaluation import evaluate
from .flat import wire_type
from .inner import InnerStep, prepare, progress, to_device
from .resume import changes
from .runlog import RunLog, manifest
from .start import Start, line, ranges
from .stopping import Vote, Wish
from .tasks.sampler import Shards
from .team import ranks_of_a_node
from .trace import Trace
from .worker import SlowMo

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
    taken: list[bool] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    input_s: float = 0.0
    waited_s: float = 0.0
    sent_bytes: int = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        metrics = [{k: v.cpu() for k, v in m.items()} for m in self.metrics]
        elapsed_s = time.perf_counter() - self.started
        return {
            "losses": [x.cpu() for x in self.losses], "metrics": metrics, "taken": self.taken, "elapsed_s": elapsed_s,
            "input_s": self.input_s, "waited_s": self.waited_s, "sent_bytes": self.sent_bytes,
        }  # fmt: skip

    def take(self, saved: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state` gave."""
        self.losses = to_device(saved["losses"], device)
        self.metrics = to_device(saved["metrics"], device)
        self.started = time.perf_counter() - saved["elapsed_s"]
        self.taken = saved.get("taken", [True] * len(self.losses))
        self.waited_s, self.sent_bytes = saved["waited_s"], saved["sent_bytes"]
        self.input_s = saved.get("input_s", 0.0)


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
    model = prepare(task.model, config.compute, comm.device)
    mark("data and model")
    torch.manual_seed(run.seed * 1_000_003 + comm.rank + 1)  # dropout and the like differ by rank

    rates = optim.scaled(config.optimizer, config.task.batch_size * comm.size)
    optimizer = optim.make(rates, [p for p in model.parameters() if p.requires_grad])
    slow, comm.allreduce = config.slowmo, config.comm.allreduce
    worker = SlowMo(
        model, optimizer, comm, BASES[config.base.algorithm](config.base), tau=slow.tau, alpha=slow.alpha,
        beta=slow.beta, buffers=slow.buffers, average=slow.average, gamma=slow.gamma, sharded=slow.sharded,
        overlap=slow.overlap, ranks_per_worker=config.run.ranks_per_worker() or ranks_of_a_node(comm),
        wire=wire_type(config.comm.dtype), progress=progress(config.comm.progress, config.compute, comm),
    )  # fmt: skip
    inner = InnerStep(task, worker, config.compute, config.optimizer.clip_norm)
    checkpoints = Checkpoints(
        worker, folder / "checkpoints", keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every,
        layout=config.checkpoint.layout, asynchronous=config.checkpoint.write == "async", config=dump(config),
    )  # fmt: skip
    extra = _go_on(inner, config, resume) if resume else {}
    checkpoints.gave_up_later = resume is not None
    first = worker.state.step
    position = (first, *extra.get("data", (0, 0)))
    shards = Shards(len(task.train), comm.size, comm.rank, config.task.batch_size, run.seed, position)
    steps = run.steps or shards.steps(run.epochs)
    epochs = run.epochs or shards.time(steps)
    window, last = _Window(), extra.get("last", {})
    if extra and resume and resume.ranks == comm.size:
        window.take(extra["window"], comm.device)

    hosts = comm.gather(comm.host)
    notes = list(getattr(task, "notes", []))
    log = None
    if comm.rank == 0:
        library = library_version() if isinstance(comm, Communicator) else f"simulated, {comm.size} ranks"
        log = RunLog(folder, config, manifest(library, hosts, threads) | {"notes": notes}, first if resume else None)
    if show is not None:
        lines = _introduction(config, worker, shards, steps, threads, folder) + _on_computing(config, rates.lr)
        lines += notes + _on_checkpoints(config, checkpoints)
        lines += comm.warnings
        show.start(lines + (_on_resume(resume, comm.size) if resume else []), first, steps)
    if resume:
        resume.close()

    mark("state")
    comm.trace = Trace(comm.rank) if trace else None
    started = time.perf_counter() - extra.get("elapsed_s", 0.0)
    stopped = ""
    vote = Vote(comm, wish or Wish(), first)
    feed = tasks.batches(task.train, _order(shards, first, steps, config.compute.accumulate))
    try:
        for step in range(first, steps):
            time_now, end = (step, steps) if config.unit == "steps" else (shards.time(step), epochs)
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(rates, time_now, end)
            waited, sent = comm.waited_s, comm.sent_bytes
            loss, metrics = inner.take(feed)
            window.waited_s += comm.waited_s - waited
            window.sent_bytes += comm.sent_bytes - sent
            window.input_s += inner.input_s
            window.losses.append(loss)
            window.metrics.append(metrics)
            window.taken.append(inner.taken)

            done = step + 1
            if show is not None:
                show.advance(done)
            records = []
            paused = time.perf_counter()
            if start is not None and step == first:
                _tell_start(start, comm, log, show)
            if done % run.log_every == 0 or done == steps:
                rate = optimizer.param_groups[0]["lr"]
                records.append({"kind": "train", **_sum_up(window, inner, config, done), "lr": rate})
                window = _Window()
            if _evaluates(run, shards, done, steps):
                last = {"kind": "eval", "step": done, **evaluate(inner, run.eval_workers)}
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
                     "task": state, "inner": inner.state_dict()}
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
        feed.close()
        if comm.trace is not None:
            comm.trace.write(folder / "trace" / f"rank-{comm.rank}.json")
        if show is not None:
            show.close()
    return last


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


def _order(shards: Shards, first: int, steps: int, parts: int) -> Iterator[tuple[int, Tensor]]:
    """The epoch and the indices of this rank's micro-batches, `parts` of them to a step."""
    for step in range(first, steps):
        for indices in shards.indices(step).chunk(parts):
            yield shards.at(step)[0], indices


def _sum_up(window: _Window, inner: InnerStep, config: Config, step: int) -> dict[str, Any]:
    """The window's means over steps and workers, of steps that were taken; the loss also as least and largest over
    workers. Raises: SlowmoError on every rank if any loss is not finite, or no loss scale is small enough.
    """
    worker, comm, inside = inner.worker, inner.worker.comm, inner.worker.team.inside
    inner.check_scale()
    taken = torch.tensor(window.taken)
    losses = torch.stack(window.losses).double().cpu()
    bad = (~losses.isfinite() & taken).nonzero()
    first_bad = step - len(losses) + int(bad[0]) + 1 if len(bad) else None
    names = sorted(window.metrics[0])
    values = [losses, *(torch.stack([m[k].double() for m in window.metrics]).cpu() for k in names)]
    means = [float(v[taken].mean()) for v in values]  # nan where no step was taken
    of_worker = _mean(inside.gather(means[0])) if inside else means[0]
    elapsed = time.perf_counter() - window.started
    costs = [window.waited_s / elapsed, window.input_s / elapsed, window.sent_bytes / len(losses)]
    everybody = comm.gather((first_bad, means, of_worker, int(taken.sum()), costs))
    failed = [(b, r) for r, (b, *_) in enumerate(everybody) if b is not None]
    if failed:
        at, rank = min(failed)
        rate = worker.optimizer.param_groups[0]["lr"]
        raise SlowmoError(
            f"The loss became inf or nan at step {at} on rank {rank} (learning rate {rate:g}).",
            f"Type --set optimizer.lr={rate / 10:g}, or --set optimizer.warmup=...; the run folder has the metrics.",
        )
    told = [(m, own) for _, m, own, n, _ in everybody if n] or [(means, of_worker)]  # ranks that took a step
    mean = [_mean(values) for values in zip(*(m for m, _ in told), strict=True)]
    of_workers = [own for _, own in told]
    waited, read, sent = (_mean(values) for values in zip(*(c for *_, c in everybody), strict=True))
    left_out = sum(len(losses) - n for *_, n, _ in everybody)
    skipped = {"skipped_steps": left_out} if config.compute.precision == "float16" else {}
    return {
        "step": step,
        **dict(zip(["loss", *names], mean, strict=True)),
        "loss_min": min(of_workers),
        "loss_max": max(of_workers),
        **skipped,
        "samples_per_s": len(losses) * config.task.batch_size * comm.size / elapsed,
        "communication_share": waited,
        "input_share": read,
        "sent_bytes_per_step": sent,
        "consensus": worker.consensus_distance(),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _go_on(inner: InnerStep, config: Config, resume: Checkpoint) -> dict[str, Any]:
    """Put worker, loss scale and task where the checkpoint is; what the loop saved there.

    Optimizer settings that were changed on purpose are the new ones; another optimizer starts with empty buffers.
    """
    worker, task = inner.worker, inner.task
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
    inner.load_state_dict(extra.get("inner") or {}, resume.ranks)
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
        alone = worker.team.across.size == 1
        where += ", all one worker (run.worker)," if alone else f", {worker.team.ranks} to a worker,"
    return [
        f"{config.task.name}: {parameters:,} parameters, {shards.samples:,} samples, {length}, "
        f"{config.task.batch_size} x {comm.size} samples per step",
        f"{config.base.algorithm}{graph}, {config.optimizer.name} lr {config.optimizer.lr:g}, {outer}{never}",
        f"{where} on {comm.device.type}, {threads} thread{'s' if threads > 1 else ''} each; run folder {folder}",
    ]


def _on_computing(config: Config, rate: float) -> list[str]:
    """What differs from a plain step in float32, in one line, or none."""
    c, opt = config.compute, config.optimizer
    said = [
        f"{c.precision} autocast" if c.precision != "float32" else "",
        f"{c.accumulate} micro-batches per step" if c.accumulate > 1 else "",
        "compiled" if c.compile else "",
        "channels last" if c.channels_last else "",
        f"gradient clipped to norm {opt.clip_norm:g}" if opt.clip_norm else "",
        f"lr {rate:g} by linear scaling" if opt.reference_batch else "",
    ]
    return [", ".join(filter(None, said))] if any(said) else []


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
