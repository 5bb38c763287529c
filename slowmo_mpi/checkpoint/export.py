"""A checkpoint's model as a plain state_dict, in a file that loads without this package."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SlowmoError, UsageError, did_you_mean
from .read import Checkpoint
from .tree import dtype_of
from .write import PART, sync

FORMATS = (".safetensors", ".pt")
PIECE = 1 << 22  # elements that are averaged at once, in float64


def check_target(out: Path, force: bool) -> None:
    """Refuse what cannot be written, before the work is done. Raises: UsageError."""
    if out.suffix not in FORMATS:
        raise UsageError(
            f"{out} ends in neither {' nor '.join(FORMATS)}.{did_you_mean(out.suffix, FORMATS)}",
            "Give for example model.safetensors.",
        )
    if out.is_dir():
        raise UsageError(f"{out} is a folder.", "Give a file in it.")
    if out.exists() and not force:
        raise UsageError(f"{out} is there already.", "Add --force to overwrite it, or give another name.")
    if not out.parent.is_dir():
        raise UsageError(f"There is no folder {out.parent}.", f"Type `mkdir -p {out.parent}`.")


def state_dict(checkpoint: Checkpoint, rank: int | None = None) -> dict[str, Tensor]:
    """The model's state_dict, in its own order: contiguous tensors on the CPU, tied weights one tensor.

    rank: that worker's own. None: the average of all, sum(w z) / m with messages in flight included (as
    saved.for_rank has it) and the mean of batch-norm's statistics, in float64; what has no average is rank 0's.
    Raises: UsageError where there is no such rank.
    """
    ranks = checkpoint.ranks
    if rank is not None and not 0 <= rank < ranks:
        raise UsageError(
            f"{checkpoint.path} has no rank {rank}: {ranks} wrote it.",
            f"Give --rank 0 to {ranks - 1}, or leave it out.",
        )
    sources = dict(zip(checkpoint.table("model/key"), checkpoint.table("model/source"), strict=True))
    trees = [json.loads(checkpoint.text(r)) for r in (range(ranks) if rank is None else [rank])]
    found = _trained(checkpoint, trees, rank, set(sources.values()))
    averaged = set(checkpoint.table("model/averaged")) if rank is None else set()
    for source in set(sources.values()) - set(found):
        kind, name = source.split(":", 1)
        places = [tree[kind][name]["$tensor"] for tree in trees]
        if kind == "buffers" and name in averaged:
            total = torch.stack([_tensor(checkpoint, place, r).double() for r, place in enumerate(places)]).sum(0)
            found[source] = total.div_(ranks).to(dtype_of(places[0][4]))
        else:
            found[source] = _tensor(checkpoint, places[0], rank or 0)
    return {key: found[source] for key, source in sources.items()}


def save(tensors: dict[str, Tensor], out: Path) -> None:
    """Write a state_dict: complete under its name, or not there. Raises: SlowmoError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = out.with_name(f".{out.name}.{os.getpid()}{PART}")
    try:
        if out.suffix == ".pt":
            with part.open("wb") as file:
                torch.save(tensors, file)
        else:
            save_file(_apart(tensors), part, metadata={"format": "pt"})
        sync(part)
        os.replace(part, out)
        sync(out.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors tell a full disk in their own way
        cause = error if isinstance(error, OSError) else error.__context__
        why = getattr(cause, "strerror", None) or " ".join(str(error).split())
        raise SlowmoError(f"{out} cannot be written: {why}.", "Give a file in another folder.") from None
    finally:
        part.unlink(missing_ok=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a copy of each tensor that has a second key: safetensors takes no memory twice."""
    first = {id(t): key for key, t in reversed(tensors.items())}
    return {key: t if first[id(t)] == key else t.clone() for key, t in tensors.items()}


def _trained(
    checkpoint: Checkpoint, trees: Sequence[dict[str, Any]], rank: int | None, wanted: set[str]
) -> dict[str, Tensor]:
    """The trained parameters among `wanted`, by source; one vector after the other, so that no more lie in memory."""
    names, vectors, starts, shapes, strides = (
        checkpoint.table(f"layout/{column}") for column in ("name", "vector", "start", "shape", "strides")
    )
    found = {}
    for vector in dict.fromkeys(vectors):
        flat = checkpoint.vector(f"z/{vector}", rank) if rank is not None else _average(checkpoint, vector, trees)
        for i, name in enumerate(names):
            if vectors[i] == vector and f"trained:{name}" in wanted:
                view = torch.as_strided(flat, json.loads(shapes[i]), json.loads(strides[i]), int(starts[i]))
                found[f"trained:{name}"] = view.clone(memory_format=torch.contiguous_format)
    return found


def _average(checkpoint: Checkpoint, vector: str, trees: Sequence[dict[str, Any]]) -> Tensor:
    """sum(w z + sent packet) / m of one vector, and what a delayed average will add to it."""
    name = f"z/{vector}"
    terms = {name: [tree["w"] for tree in trees]}
    sent = [tree["in_flight"]["sent"] if tree["in_flight"] else 0.0 for tree in trees]
    if any(sent):
        terms[f"packet/{vector}"] = sent
    if f"ahead/{vector}" in checkpoint.datasets:  # a delayed average, as it will be taken in
        terms[f"ahead/{vector}"] = [1.0] * len(trees)
    shape = checkpoint.datasets[name][1]
    if len(shape) == 1 and len(terms) == 1:  # all workers are equal, and so is their average, to the bit
        return checkpoint.vector(name, 0)
    mean = torch.empty(shape[-1], dtype=dtype_of(vector))
    for start in range(0, shape[-1], PIECE):
        here = slice(start, min(start + PIECE, shape[-1]))
        total = torch.zeros(here.stop - here.start, dtype=torch.float64)
        for term, weights in terms.items():
            if len(checkpoint.datasets[term][1]) == 1:  # the same on all ranks
                weights = [math.fsum(weights)]
            for r, weight in enumerate(weights):
                if weight:
                    total.add_(checkpoint.vector(term, r, here).double(), alpha=weight)
        mean[here] = total.div_(len(trees))
    return mean


def _tensor(checkpoint: Checkpoint, place: Sequence[Any], rank: int) -> Tensor:
    """A tensor of a rank's tree, from where its "$tensor" says that it lies."""
    name, start, shape, strides, kind, _ = place
    if 0 in shape:
        return torch.empty(shape, dtype=dtype_of(kind))
    part = checkpoint.vector(name, rank, slice(start, start + math.prod(shape)))
    return torch.as_strided(part, shape, strides)
