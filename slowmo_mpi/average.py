"""Line 6 of Algorithm 1: the average of the workers' iterates.

    exact      xbar = 1/m sum_i w_i z_i
    rounded    xbar = x0 - 1/m sum_i Q(w_i (x0 - z_i)), the same but for Q, since the weights sum to m
    delayed    xbar = x0 - 1/m sum_i w_i (x0 - z_i) of the round before, with that round's gamma in lines 7 and 8

What is rounded is the way of one round, not z: it is small beside z, and so is what rounding takes; and that is not
lost either (comm/compressed.py). The delayed average is another algorithm, CO2 (Sun et al., ICLR 2024): a round's
displacement is averaged while the next round computes, so nobody waits for it, and is a round old when it is taken in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .state import Late

if TYPE_CHECKING:
    from .worker import SlowMo


def average_(worker: SlowMo, number: int, z: Tensor) -> None:
    """z = xbar, z being this rank's part of flat vector `number`; with sharded slow state only its shard of that."""
    across, w, x0 = worker.team.across, worker.state.w, worker.state.slow[number].x0
    if worker.feedback:
        mean = worker.feedback[number].all_reduce(across, (x0 - z).mul_(w), "exact average")()
        torch.sub(x0, mean, out=z)
        return
    z.mul_(w / across.size)
    if worker.sharded:
        across.reduce_scatter_(z, "exact average")
    else:
        across.all_reduce_(z, "exact average")


def send_off(worker: SlowMo, rates: list[float]) -> Late:
    """Begin to average the way w (x0 - z) that each worker went in this round, and return it as it is under way."""
    s, across = worker.state, worker.team.across
    late = Late(rates)
    for number, (z, slow) in enumerate(zip(s.z, s.slow, strict=True)):
        way = (slow.x0 - z).mul_(s.w)
        if worker.feedback:
            late.coming.append(worker.feedback[number].all_reduce(across, way, "delayed average"))
        else:
            late.coming.append(across.start_all_reduce(way, "delayed average", divisor=across.size).wait)
    return late


def ahead(worker: SlowMo, number: int) -> Tensor:
    """What lines 7 and 8 will add to x0 when the displacement under way is taken in; nothing is changed."""
    late, slow = worker.state.late, worker.state.slow[number]
    assert late is not None
    z = slow.x0 - late.wait()[number]
    worker.lines_7_and_8(number, slow.x0.clone(), slow.u.clone(), z, late.rates)
    return z.sub_(slow.x0)
