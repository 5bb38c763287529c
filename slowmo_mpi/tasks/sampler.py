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
    Raises UsageError when there are fewer than m b samples.
    """

    def __init__(self, samples: int, ranks: int, rank: int, batch_size: int, seed: int):
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
        self._epoch = -1
        self._order = np.empty((0, batch_size), np.int64)  # (steps_per_epoch, b), of this rank in the epoch

    def epoch(self, step: int) -> int:
        """The epoch that global step `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> Tensor:
        """This rank's samples at global step `step`, from 0: int64, (b,)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            used = generator.permutation(self.samples)[: self.steps_per_epoch * self.ranks * self.batch_size]
            by_rank = used.reshape(self.steps_per_epoch, self.ranks, self.batch_size)
            self._order, self._epoch = by_rank[:, self.rank].astype(np.int64), epoch
        return torch.from_numpy(self._order[k].copy())


def share(samples: int, ranks: int, rank: int) -> range:
    """Rank `rank`'s contiguous share of `samples`: disjoint, complete, sizes differing by at most one.

    For evaluation, where every sample counts once. A share is empty where there are fewer samples than ranks.
    """
    return range(samples * rank // ranks, samples * (rank + 1) // ranks)
