"""A whole training step by every base, with and without SlowMo, and by torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..bases import DPSGD, OSGP, SGP, AllReduce, Base, Local
from ..errors import UsageError
from ..flat import wire_type
from .common import Bench, Sample
from .gloo import gloo
from .models import build
from .report import OK, Column, Report, report, spread
from .training import PARTS, Training

BASES: dict[str, Callable[[], Base]] = {
    "allreduce": AllReduce, "local": Local, "dpsgd": DPSGD, "sgp": SGP, "osgp": OSGP,
}  # fmt: skip
COPIES = 7  # of the model, kept for one variant: weights, gradients, momentum, anchor, slow momentum, two messages
ABOUT = (
    "time of a training step, mean over a block; with SlowMo (of float32: sharded, overlap), outer steps included",
    "forward ... outer step: the ranks' mean; wait: for messages, in whichever of them (ddp does not tell)",
)


def measure(
    bench: Bench, model: str, parameters: int, batch: int, image: int, bases: Sequence[str], slowmo: int, steps: int,
    dtype: str, against: str | None,
) -> Report:  # fmt: skip
    """A row per variant: every base alone and with SlowMo of tau = `slowmo` (0: alone only)."""
    comm = bench.comm
    steps = -(-steps // slowmo) * slowmo if slowmo else steps
    variants = [(name, tau) for name in bases for tau in dict.fromkeys((0, slowmo)) if name != "local" or tau]
    if not variants:
        raise UsageError("Local steps without SlowMo never meet.", "Type --slowmo 12, or other --bases.")
    count = _check_memory(bench, model, parameters, image, len(variants) + bool(against))
    make = partial(Training, bench, (model, parameters), batch, image)
    trained: dict[str, Training] = {}
    wire = wire_type(dtype)
    with gloo(comm) if against else nullcontext():
        for name, tau in variants:
            label = f"{name}, tau {tau}" if tau else name
            bench.tell(f"step, {model}: making {label}")
            sharded = tau > 0 and wire is None
            settings: dict[str, Any] = {"sharded": sharded, "overlap": sharded and comm.size > 1}
            trained[label] = make(BASES[name](), tau=tau, wire=wire, **settings)
        if against:
            trained[against] = make(wrap=_distributed)
        for t in trained.values():
            t.block(2)  # warms it up
        bench.tell(f"step, {model}: measuring blocks of {steps} steps")
        taken = bench.alternate({label: _block(t, steps) for label, t in trained.items()})
        same = {"allreduce", f"allreduce, tau {slowmo}", against}
        ok = {label: t.is_right(same=label in same) for label, t in trained.items()}
    rows = []
    for label, timing in taken.items():
        parts: dict[str, float | None] = {part: timing.median(part) for part in PARTS}
        if label == against:
            parts["wait_s"] = None
        if "tau" not in label:
            parts["outer_s"] = None
        images = batch * comm.size / timing.median()
        rows.append({"variant": label, **timing.spread(), **parts, "images_per_s": images, "ok": ok[label]})
    names = ("forward", "backward", "optimizer", "outer step", "wait")
    columns = [
        Column("variant", "variant"), *spread("ms", 1e3),
        *(Column(part, name, ".1f", 1e3) for part, name in zip(PARTS, names, strict=True)),
        Column("images_per_s", "images/s", ".1f"), OK,
    ]  # fmt: skip
    what = f"{model}, {count:,} parameters, batch {batch} a rank, {image}x{image} random images, SGD with momentum"
    about = [f"{what}; ours send {dtype}; blocks of {steps} steps", *ABOUT]
    if against:
        about.append("ddp: DistributedDataParallel over gloo, its settings as they come")
    return report(bench, "step", about, columns, rows)


def _block(t: Training, steps: int) -> Callable[[], Sample]:
    return lambda: t.block(steps)


def _distributed(model: nn.Module) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model)


def _check_memory(bench: Bench, model: str, parameters: int, image: int, variants: int) -> int:
    """The model's parameters. All variants alternate, so all are in memory at once.

    Raises: UsageError where that is too little.
    """
    comm = bench.comm
    count = sum(p.numel() for p in build(model, image, parameters).parameters())
    need = COPIES * 4 * count * variants * (comm.local_size if comm.device.type == "cpu" else 1)
    free = min(comm.gather(_free_bytes(comm.device.type == "cuda")))
    if need > free:
        raise UsageError(
            f"{variants} variants of this model need up to {need / 1e9:.0f} GB; there are {free / 1e9:.0f} GB.",
            "Choose fewer --bases, or a smaller --model.",
        )
    return count


def _free_bytes(cuda: bool) -> int:
    if cuda:
        import torch

        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)
