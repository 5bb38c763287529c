"""What a worker refuses: settings that cannot work, ranks that differ, push-sum weights that do not add up."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch

from .comm.progress import WAYS
from .errors import SlowmoError, UsageError
from .flat import FlatParameters

if TYPE_CHECKING:
    from .worker import SlowMo


def check_settings(worker: SlowMo) -> None:
    """Refuse what cannot work. Raises: UsageError."""
    for name, value, known in (
        ("buffers", worker.buffers, ("reset", "maintain", "average")),
        ("average", worker.average, ("exact", "none", "delayed")),
        ("gamma", worker.gamma, ("mean", "last")),
        ("progress", worker.progress, WAYS),
    ):
        if value not in known:
            raise UsageError(f"{name} = {value!r} is not known.", f"It is one of: {', '.join(known)}.")
    tau, alpha, beta = worker.tau, worker.alpha, worker.beta
    if tau != int(tau) or tau < 0 or not 0 <= alpha < math.inf or not 0 <= beta < 1:
        raise UsageError(
            f"tau = {tau}, alpha = {alpha}, beta = {beta} is out of range.",
            "tau is a whole number >= 0, alpha >= 0, 0 <= beta < 1.",
        )
    if worker.overlap and (not worker.sharded or worker.team.ranks > 1 or worker.average != "exact"):
        raise UsageError(
            "overlap = true gathers the sharded anchor while the next forward pass computes: it needs an exact "
            "average, sharded slow state and workers of one rank.",
            "Add sharded = true, or leave overlap off.",
        )
    if worker.sharded and worker.average == "none":
        raise UsageError(
            "Without averaging every worker has its own slow state; it cannot be sharded.",
            "Use sharded=False.",
        )
    if worker.wire not in (None, torch.bfloat16, torch.float16):
        raise UsageError(
            f"Messages cannot be rounded to {worker.wire}.", "wire is None, torch.bfloat16 or torch.float16."
        )
    if worker.sharded and tau and (worker.wire is not None or worker.average == "delayed"):
        raise UsageError(
            "What is averaged rounded or delayed is x0 - z, and with a sharded slow state no rank has all of x0.",
            'Use sharded=False, or wire=None and average="exact".',
        )
    if any("lr" not in g for g in worker.optimizer.param_groups):
        raise UsageError(
            f"{type(worker.optimizer).__name__} has a parameter group without a learning rate.",
            'SlowMo needs gamma: use an optimizer whose groups have "lr".',
        )
    apart = not worker.base.communicates and (tau == 0 or worker.average == "none")
    if apart and worker.team.across.size > 1:
        raise UsageError(
            f"{type(worker.base).__name__} without an exact average never meets the other workers.",
            'Set tau >= 1 and average="exact".',
        )
    if worker.base.communicates and tau > 1 and worker.average != "none" and not worker.base.exchanges(tau):
        raise UsageError(
            f"{type(worker.base).__name__} with this delay exchanges nothing in a round of tau = {tau} steps.",
            "Choose a delay below tau, or Local().",
        )


def check_alike(worker: SlowMo, flat: FlatParameters) -> None:
    """That all ranks have the same model and the same settings."""
    others = [(n, tuple(p.shape), str(p.dtype)) for n, p in worker.model.named_parameters() if not p.requires_grad]
    buffers = [(n, tuple(b.shape), str(b.dtype)) for n, b in worker.model.named_buffers()]
    settings = {
        k: getattr(worker, k)
        for k in ("base", "tau", "alpha", "beta", "buffers", "average", "gamma", "sharded", "wire", "optimizer")
    }
    settings["optimizer"] = type(worker.optimizer).__name__
    everybody = worker.comm.gather((hash_of([flat.fingerprint(), others, buffers]), hash_of(settings)))
    for part, what, hint in (
        (0, "model", "Build the same model, with the same parameters frozen, on every rank."),
        (1, "settings", "Give SlowMo the same base, tau, alpha, beta and the like on every rank."),
    ):
        different = [r for r, prints in enumerate(everybody) if prints[part] != everybody[0][part]]
        if different:
            raise SlowmoError(f"The {what} of rank {different[0]} differs from rank 0's.", hint)


def check_weights(worker: SlowMo) -> None:
    """Push-sum's invariant: with nothing in flight the weights sum to m. Also that all are at the same step."""
    s = worker.state
    everybody = worker.comm.gather((s.w, s.step))
    total = math.fsum(w for w, _ in everybody)
    if abs(total - worker.comm.size) > 1e-6 * worker.comm.size or not all(w > 0 for w, _ in everybody):
        raise SlowmoError(
            f"The push-sum weights sum to {total:.9g} at step {s.step}, not to {worker.comm.size}, the ranks.",
            "A message was lost or counted twice; this is a bug, please report it with the configuration.",
        )
    steps = [step for _, step in everybody]
    if len(set(steps)) > 1:
        raise SlowmoError(
            f"The ranks are at different steps: {steps}.", "Call worker.step() equally often on every rank."
        )


def hash_of(thing: object) -> str:
    """A fingerprint of anything whose repr tells all of it."""
    return hashlib.sha256(repr(thing).encode()).hexdigest()
