"""Which samples a rank sees at which step: a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slowmo_mpi.errors import UsageError


class Shards:
    """Disjoint shares of a fresh permutation in every epoch, the same number of steps on every rank.

    With m ranks, batches of b samples and N samples, epoch e draws a permutation pi of 0..N-1 from
    (seed, e), and at step k of the epoch rank r sees

        pi[(k m + r) b : (k m + r + 1) b],    k < steps_per_epoch = N // (m b).

    So in step k the m ranks together see what one rank with batches of m b would see, whatever the
    algorithm; the N - m b steps_per_epoch samples left over differ from epoch to epoch.

    start: (step, epoch, position), where a run of perhaps another number of ranks left off: global step `step` is
    the first, and `position` samples of that epoch are used. What is left of the epoch is (N - position) // (m b)
    steps. `at(step)` tells epoch and position, to go on from; with as many ranks it is as if it had not ended.
    Raises UsageError when there are fewer than m b samples.
    """

    def __init__(
        self, samples: int, ranks: int, rank: int, batch_size: int, seed: int, start: tuple[int, int, int] = (0, 0, 0)
    ):
        if batch_size < 1:
            raise UsageError(f"task.batch_size = {batch_size} is not positive.", "Set task.batch_size to 1 or more.")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} is not one of {ranks} ranks")
        self.samples, self.ranks, self.rank = samples, ranks, rank
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = samples // (ranks * batch_size)
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"{ranks} ranks with batches of {batch_size} need {ranks * batch_size} samples for one step, "
                f"and there are {samples}.",
                f"Set task.batch_size to {samples // ranks} or less."
                if samples >= ranks
                else f"Start {samples} ranks or fewer.",
            )
        self._first, self._first_epoch, self._first_position = start
        self._first_steps = (samples - self._first_position) // (ranks * batch_size)  # in what is left of that epoch
        self._epoch = -1
        self._order = np.empty(0, np.int64)  # of the epoch's samples

    def at(self, step: int) -> tuple[int, int]:
        """The epoch, from 0, that global step `step` belongs to, and how many of its samples were used before."""
        k = step - self._first
        if k < 0:
            raise ValueError(f"step {step} is before the first, {self._first}")
        if k < self._first_steps:
            return self._first_epoch, self._first_position + k * self.ranks * self.batch_size
        epochs, k = divmod(k - self._first_steps, self.steps_per_epoch)
        return self._first_epoch + 1 + epochs, k * self.ranks * self.batch_size

    def time(self, step: int) -> float:
        """Epochs done before global step `step`."""
        epoch, position = self.at(step)
        return (epoch * self.steps_per_epoch + position / (self.ranks * self.batch_size)) / self.steps_per_epoch

    def steps(self, epochs: int) -> int:
        """The global step at which so many epochs are done."""
        if epochs <= self._first_epoch:
            return self._first
        return self._first + self._first_steps + (epochs - self._first_epoch - 1) * self.steps_per_epoch

    def indices(self, step: int) -> Tensor:
        """This rank's samples at global step `step`, from 0: int64, (b,)."""
        epoch, position = self.at(step)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._order, self._epoch = generator.permutation(self.samples).astype(np.int64), epoch
        mine = position + self.rank * self.batch_size
        return torch.from_numpy(self._order[mine : mine + self.batch_size].copy())


def share(samples: int, ranks: int, rank: int) -> range:
    """Rank `rank`'s contiguous share of `samples`: disjoint, complete, sizes differing by at most one.

    For evaluation, where every sample counts once. A share is empty where there are fewer samples than ranks.
    """
    return range(samples * rank // ranks, samples * (rank + 1) // ranks)
