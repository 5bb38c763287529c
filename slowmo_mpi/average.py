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
from torch import Tensor, nn

from .checks import hash_of
from .errors import SlowmoError
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


# ---- what is averaged with the parameters ----
def statistics(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Batch-norm's running means and variances (other buffers may be masks or caches, which have no average)."""
    return [
        (key, buffer)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase)
        for key, buffer in module.named_buffers(prefix=name, recurse=False)
        if buffer.is_floating_point()
    ]


def average_statistics(worker: SlowMo) -> None:
    """The mean over workers of batch-norm's statistics, in place; collective."""
    if found := statistics(worker.model):
        average_tensors(worker, found, "batch-norm buffers", "Build the same model on every rank.")


def average_tensors(worker: SlowMo, named: list[tuple[str, Tensor]], what: str, hint: str) -> None:
    """The mean over workers of each tensor, in place, as one message per dtype. Raises: SlowmoError with `hint`
    where the workers' tensors differ in names or shapes."""
    shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in named]
    if len(set(worker.comm.gather(hash_of(shapes)))) > 1:
        raise SlowmoError(
            f"The workers' {what} differ in names or shapes at step {worker.state.step}; they cannot be averaged.",
            hint,
        )
    for dtype in dict.fromkeys(t.dtype for _, t in named):
        tensors = [t for _, t in named if t.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        vector = torch.cat([t.detach().reshape(-1).to(worker.state.z[0].device, wide) for t in tensors])
        worker.comm.all_reduce_(vector, what, divisor=worker.comm.size)
        for t, mean in zip(tensors, vector.split([t.numel() for t in tensors]), strict=True):
            t.copy_(mean.view(t.shape))
