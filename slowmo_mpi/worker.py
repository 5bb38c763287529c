"""A worker: a model and its optimizer, trained together with the other ranks by SlowMo over a base algorithm.

Algorithm 1 of Wang et al., ICLR 2020 [1] is `SlowMo.step` (lines 3-5, one inner step) and `SlowMo._outer_step`
(lines 6-8 and line 2 of the next round).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .average import ahead, average_, average_statistics, average_tensors, send_off, statistics
from .bases import Base
from .buckets import GradientAverage
from .checkpoint.store import Store, newest
from .checks import check_alike, check_settings, check_weights
from .comm import Endpoint
from .comm.compressed import ErrorFeedback
from .comm.progress import begin
from .flat import FlatParameters
from .restart import Restart
from .saved import by_type, describe, load, pack_all, restore, state_of
from .slowmo import Slow, outer_step
from .state import State
from .team import Team

CONSENSUS_SAMPLE = 65_536  # coordinates that the consensus distance is estimated from


class SlowMo:
    """SlowMo over a base algorithm, for any torch model and optimizer.

    model, optimizer: as in a plain loop; the model's weights become those of rank 0 and views of one vector.
    comm: `Communicator()`, or a simulated one.
    base: `AllReduce()`, `Local()`, `DPSGD(graph)`, `SGP(graph)` or `OSGP(graph, delay)`.
    tau: inner steps per round (0: the base alone); alpha: slow learning rate; beta: slow momentum.
    buffers: the optimizer's state when a round starts: "reset", "maintain" or "average" over workers.
    average: "exact"; "none" for the noaverage variant; "delayed" for CO2, where a round's average is made while the
    next round computes, and taken in at its end (average.py); gamma: the round's rate, "mean" or "last".
    sharded: keep 1/m of anchor and slow momentum on each rank (reduce-scatter and all-gather instead of an
    all-reduce: the same bytes).
    overlap: let the new anchors arrive while the next forward pass computes (restart.py); with `sharded` only. Until
    that pass has ended, read parameters in the model's forward alone, or call `settle()` first. The same bits.
    ranks_per_worker: how many ranks make one worker, with one set of parameters (team.py).
    wire: torch.bfloat16 or torch.float16: what gossip, exact averages and AllReduce's gradients are rounded to on their
    way between workers; what rounding takes is kept and sent later. None: they travel as they are.
    progress: who moves messages on while the model computes: "hooks", "thread" or "auto" (comm/progress.py).
    Batch-norm's running statistics are averaged wherever the parameters are: at every exact average, and while
    `averaged()` lasts; between them each worker keeps its own. Other buffers are rank 0's at the start, and then
    each worker's own.

    Raises: UsageError for settings that cannot work; SlowmoError where the ranks' models differ in shape.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Endpoint,
        base: Base,
        *,
        tau: int = 48,
        alpha: float = 1.0,
        beta: float = 0.6,
        buffers: str = "reset",
        average: str = "exact",
        gamma: str = "mean",
        sharded: bool = False,
        overlap: bool = False,
        ranks_per_worker: int = 1,
        wire: torch.dtype | None = None,
        progress: str = "auto",
    ):
        self.model, self.optimizer, self.comm = model, optimizer, comm
        self.tau, self.alpha, self.beta = tau, alpha, beta
        self.buffers, self.average, self.gamma = buffers, average, gamma
        self.sharded, self.overlap, self.wire, self.progress = sharded, overlap, wire, progress
        self.team = Team.of(comm, ranks_per_worker)
        self.base = base.bind(self.team.across.size)
        self._store: Store | None = None
        check_settings(self)

        flat = FlatParameters(model, [g["params"] for g in optimizer.param_groups], self.team.ranks)
        check_alike(self, flat)
        self._broadcast_model(flat)
        self.state = State(flat, [b[self.team.part(b)] for b in flat.buffers], wire)
        # What "reset" goes back to. Most optimizers have no state before their first step; one that comes with a
        # history (a warm-up, a checkpoint) is reset to none, not to that history.
        unused = all(float(state.get("step", 1)) == 0 for state in optimizer.state.values())
        self._fresh = {p: copy.deepcopy(state) for p, state in optimizer.state.items() if unused}
        groups = optimizer.param_groups
        self.state.rate_sums = [0.0] * len(groups)
        self.state.last_rates = [0.0] * len(groups)
        self.state.peak_rates = [max(float(g["lr"]), float(g.get("initial_lr", 0.0))) for g in groups]
        comm.find_levels()
        self._poller = begin(progress, model, comm)
        self._restart = Restart(model, flat, comm, self.post) if overlap and comm.size > 1 else None
        averaging = comm if self.base.averages_gradients else self.team.inside
        rounded = wire if self.base.averages_gradients else None  # inside a worker gradients are not
        self._gradients = GradientAverage(flat, averaging, rounded) if averaging and averaging.size > 1 else None
        if tau:
            self.state.slow = [Slow.start(b[self.share_of(b)]) for b in flat.buffers]
        self.feedback: list[ErrorFeedback] = []  # of line 6
        if wire is not None and average != "none":
            self.feedback = [ErrorFeedback.start(slow.x0, wire) for slow in self.state.slow]
        gradients = self._gradients.errors if self._gradients is not None else []
        self.state.errors = {
            "error": by_type(flat, [f.error for f in self.feedback]),
            "gradient_error": {str(i): e for i, e in enumerate(gradients)},
        }

    # ---- inner steps ----
    @torch.no_grad()
    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """After `loss.backward()`: the optimizer's step, the base's exchange, and every `tau` steps the outer step.

        scaler: takes the optimizer's step (`scaler.step`), or leaves it out where gradients are inf or nan; the rest
        goes on, so that every rank steps equally often. Call `scaler.update()` afterwards.
        """
        self.settle()
        s = self.state
        self.comm.step = s.step
        s.flat.check([g["params"] for g in self.optimizer.param_groups])
        self.post()
        s.last_rates = [float(g["lr"]) for g in self.optimizer.param_groups]
        s.peak_rates = list(map(max, s.peak_rates, s.last_rates))
        s.rate_sums = [total + rate for total, rate in zip(s.rate_sums, s.last_rates, strict=True)]
        if self._gradients is not None:
            self._gradients.finish()
        self.base.step(s, self.team.across, partial(self._update, scaler), self._remaining())
        if self.base.communicates:
            self.team.gather(s.flat.buffers)
        s.step += 1
        if self.tau and s.step % self.tau == 0:
            with self.comm.span("outer step", "outer step"):
                self._outer_step()
        self.post()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """`backward()` in the block adds to the gradients and averages nothing; the one after it averages the sum."""
        if self._gradients is not None:
            self._gradients.waits = True
        try:
            yield
        finally:
            if self._gradients is not None:
                self._gradients.waits = False

    def average_gradients(self) -> None:
        """Average gradients that were set by hand, so that they can be clipped: `backward()` has averaged its own, and
        `step()` averages what nobody has.
        """
        if self._gradients is not None:
            self._gradients.complete()

    @torch.no_grad()
    def drain(self) -> None:
        """Take in everything in flight; call it after the last step, and before you use this worker's own weights.

        With a delayed average on all ranks together: x0 moves as at the next round's end, and z with it.
        """
        self.settle()
        s = self.state
        self.base.drain(s, self.team.across)
        if s.late is not None:
            for number, (z, slow) in enumerate(zip(s.z, s.slow, strict=True)):
                z.copy_(z + ahead(self, number))
                self.lines_7_and_8(number, slow.x0, slow.u, slow.x0 - s.late.wait()[number], s.late.rates)
            s.late = None
        self.team.gather(s.flat.buffers)

    def post(self) -> None:
        """Post what travels while the next gradient is computed, once per step; what is arriving comes first."""
        s = self.state
        if s.begun < s.step and not self.is_restarting:
            self.base.before_gradient(s, self.team.across, self._remaining())
            s.begun = s.step

    @property
    def is_restarting(self) -> bool:
        """Whether parts of the new anchor are still arriving."""
        return self._restart is not None and self._restart.is_under_way

    def settle(self) -> None:
        """Wait for the new anchor where it is still arriving (`overlap`): afterwards the parameters may be read."""
        if self._restart is not None:
            with torch.no_grad():
                self._restart.finish()

    def close(self) -> None:
        """Leave the model alone: take in everything in flight, end the hooks and the progress thread. Collective.

        The parameters stay as they are. Needed only where the model goes on without this worker.
        """
        self.drain()
        for helper in (self._poller, self._restart, self._gradients):
            if helper is not None:
                helper.close()

    def _remaining(self) -> float:
        exact = self.tau and self.average != "none"
        return self.tau - self.state.step % self.tau if exact else math.inf

    def _update(self, scaler: torch.amp.GradScaler | None, scale: float) -> None:
        """The optimizer's step with every learning rate times `scale` (1/w under push-sum)."""
        groups = self.optimizer.param_groups
        rates = [g["lr"] for g in groups]
        for g in groups:
            g["lr"] = g["lr"] * scale
        self.comm.poll()
        with torch.enable_grad(), self.comm.span("computation", "optimizer step"):
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
        self.comm.poll()
        for g, rate in zip(groups, rates, strict=True):
            g["lr"] = rate

    # ---- checkpoints ----
    def state_dict(self) -> dict[str, Any]:
        """Everything that moves this rank's trajectory, as a tree of numbers and tensors (saved.py says what).

        Call it between `step()` and the next `backward()`; it waits for a delayed average. The tensors are the worker's
        own, as in torch: copy what is to outlast the next step.
        """
        return state_of(self)

    @torch.no_grad()
    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, bit for bit, torch's random streams included; on all ranks together.

        Raises: SlowmoError where the tree is of another model or has no slow state.
        """
        restore(self, tree)

    def save(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint, on all ranks together; on return it is on the disk, whole, under its name.

        extra: what else your loop needs to go on: numbers, text, tensors, and lists and dictionaries of them.
        `Checkpoints` keeps several of them, and writes beside the training.
        Raises: SlowmoError on all ranks; what was at `path` before is then as it was.
        """
        store = self._store = self._store or Store(self.comm, asynchronous=False)
        attributes, tables = describe(self, store.layout, "")
        store.save(Path(path), pack_all(self, extra), attributes, tables)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Go on from a checkpoint, or from the newest in a folder; on all ranks together. Returns its `extra`.

        As many ranks as wrote it go on bit for bit, random streams included. Another number of them goes on from a
        round's boundary; saved.for_rank says what is averaged and reset.
        Raises: SlowmoError where it is damaged, of another model, or of another number of ranks in mid-round.
        """
        with newest(Path(path), self.comm) as checkpoint:
            return load(self, checkpoint)

    # ---- the outer step ----
    def _outer_step(self) -> None:
        s, across = self.state, self.team.across
        self.base.drain(s, across)
        if self.average == "none":
            self.team.gather(s.flat.buffers)
        else:
            if self.average == "exact" or self.base.communicates:  # else nobody is to wait for the slowest
                check_weights(self)
            average_statistics(self)
        rates = [total / self.tau for total in s.rate_sums] if self.gamma == "mean" else list(s.last_rates)
        late = s.late
        if self.average == "delayed":
            ways = late.wait() if late is not None else []  # first: what rounding took goes with the next
            s.late = send_off(self, rates)
        for number, (b, slow) in enumerate(zip(s.flat.buffers, s.slow, strict=True)):
            mine, part = self.share_of(b), self.team.part(b)
            xbar = b if b.dtype == slow.x0.dtype else b.to(slow.x0.dtype)
            if self.average == "exact":
                average_(self, number, xbar[part])  # line 6
            if self.average != "delayed":
                self.lines_7_and_8(number, slow.x0, slow.u, xbar[mine], rates)
            elif late is not None:
                torch.sub(slow.x0, ways[number], out=xbar[mine])
                self.lines_7_and_8(number, slow.x0, slow.u, xbar[mine], late.rates)
            else:  # the first round: there is none before it
                xbar[mine] = slow.x0
            if xbar is not b:
                b[mine] = xbar[mine].to(b.dtype)
            if self._restart is not None and self._restart.is_safe:
                self._restart.begin(number, b)
            elif self.sharded:
                across.all_gather_(b[part], "restart from the new anchor")
        if self.average != "none":
            self.team.gather(s.flat.buffers)
            s.w = 1.0
        s.round += 1
        s.rate_sums = [0.0] * len(s.rate_sums)
        self._renew_optimizer_state()

    def lines_7_and_8(self, number: int, x0: Tensor, u: Tensor, z: Tensor, rates: list[float]) -> None:
        """On this rank's share of flat vector `number`, with each group's own gamma; z is xbar, and then the new x0."""
        b = self.state.flat.buffers[number]
        mine = self.share_of(b)
        for group, start, stop in self.state.flat.spans[number]:
            own = slice(max(start, mine.start) - mine.start, min(stop, mine.stop) - mine.start)
            if own.start < own.stop:
                gamma = self._usable(rates[group], group, x0.dtype)
                outer_step(x0[own], u[own], z[own], gamma, self.alpha, self.beta)

    def share_of(self, vector: Tensor) -> slice:
        """The part of a flat vector whose slow state this rank keeps; without exact average, of its worker's own."""
        if self.average == "none":
            return slice(0, vector.numel())
        part = self.team.part(vector)
        return self._within(part) if self.sharded else part

    def _within(self, part: slice) -> slice:
        """This worker's 1/m of a part of a flat vector."""
        own = self.team.across.shard(part.stop - part.start)
        return slice(part.start + own.start, part.start + own.stop)

    def saved_share_of(self, vector: Tensor) -> slice:
        """The part of a flat vector whose slow state this rank puts into a checkpoint: between all, each once."""
        return self.share_of(vector) if self.average == "none" else self._within(self.team.part(vector))

    def _usable(self, rate: float, group: int, dtype: torch.dtype) -> float:
        """A round's gamma. 0 where it is so small beside the largest that x0 - xbar is nothing but rounding:
        divided by it, the rounding would be a huge momentum once the rate is back.
        """
        return rate if rate > torch.finfo(dtype).eps * self.state.peak_rates[group] else 0.0

    def _renew_optimizer_state(self) -> None:
        """Line 2 of the next round: the base optimizer's buffers."""
        if self.buffers == "reset":
            self.optimizer.state.clear()
            self.optimizer.state.update({p: copy.deepcopy(state) for p, state in self._fresh.items()})
        elif self.buffers == "average":
            state = self.optimizer.state
            named = [
                (f"{i}.{key}", value)
                for i, p in enumerate(self.state.flat.parameters)
                for key, value in sorted(state.get(p, {}).items())
                if isinstance(value, Tensor) and value.is_floating_point()
            ]
            hint = 'Some ranks did not use all parameters: choose buffers = "maintain" or "reset".'
            average_tensors(self, named, "optimizer buffers", hint)

    # ---- batch-norm buffers, evaluation, measures ----
    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model as the average of all workers, sum(w z) / m, all that is in flight included, while in the block.

        Every rank must enter it. Afterwards parameters and batch-norm's statistics are bit for bit what they were.
        """
        self.settle()
        with torch.no_grad():
            s = self.state
            parameters = [b.clone() for b in s.flat.buffers]
            running = [(b, b.clone()) for _, b in statistics(self.model)]
            across = self.team.across
            flight = s.in_flight
            w = s.w + flight.sent if flight is not None and flight.age == 0 else s.w  # what was sent is z still
            for i, z in enumerate(s.z):
                xbar = z.to(torch.promote_types(z.dtype, torch.float32), copy=True).mul_(w)
                if flight is not None and flight.age and flight.sent:
                    xbar.add_(flight.packet.vectors[i], alpha=flight.sent)
                across.all_reduce_(xbar, "average for evaluation", divisor=across.size)
                z.copy_(xbar if s.late is None else xbar.add_(ahead(self, i)))
            self.team.gather(s.flat.buffers)
            average_statistics(self)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for vector, kept in zip(s.flat.buffers, parameters, strict=True):
                    vector.copy_(kept)
                for b, kept in running:
                    b.copy_(kept)

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """sqrt(1/m sum_i |z_i - mean z|^2): how far apart the workers are.

        Estimated from at most 65,536 coordinates spread evenly, scaled to all; exact for smaller models.
        """
        self.settle()
        across, square = self.team.across, 0.0
        for z in self.state.z:
            stride = -(-z.numel() // CONSENSUS_SAMPLE)
            mine = z[::stride].double()
            mean = across.all_reduce_(mine.clone(), "consensus distance", divisor=across.size)
            square += float((mine - mean).square().sum()) * z.numel() / mine.numel()
        return math.sqrt(math.fsum(self.comm.gather(square)) / across.size)

    # ---- the start ----
    @torch.no_grad()
    def _broadcast_model(self, flat: FlatParameters) -> None:
        """Everybody starts from rank 0's parameters and buffers."""
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        for x in [*flat.buffers, *frozen, *self.model.buffers()]:
            self.comm.broadcast_(x, "initial weights")
