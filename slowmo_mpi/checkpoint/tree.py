"""A state as a file holds it: a tree of numbers, text and tensors becomes JSON and a few long vectors.

A model has hundreds of tensors; a file is written fastest as few large pieces. So the JSON keeps the tree, and in
place of each tensor where it lies: {"$tensor": [vector, start, shape, strides, dtype, on the device?]}.
Nothing here can hold code: what is neither a number, text, tensor, list, tuple nor dictionary is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SlowmoError
from ..flat import FlatParameters

WHOLE = ("z", "anchor", "u", "packet", "error", "gradient_error", "displacement", "ahead")
PLAIN = (torch.float32, torch.float64, torch.float16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
STORED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # other types, by size: as their bits


@dataclass
class Vector:
    """A long vector of one rank: `parts` of it are tensors. `share`: the whole is `total` long, this rank has share."""

    name: str
    dtype: torch.dtype
    numel: int = 0
    parts: list[tuple[int, Tensor, Sequence[int]]] = field(default_factory=list)
    share: slice | None = None
    total: int = 0

    def add(self, start: int, tensor: Tensor, strides: Sequence[int]) -> None:
        """Put a tensor at `start`, in memory laid out by `strides`."""
        self.parts.append((start, tensor, strides))

    def whole(self) -> Tensor | None:
        """The vector itself where it is one contiguous CPU tensor, so that it can be written from where it lies."""
        if len(self.parts) == 1:
            _, tensor, _ = self.parts[0]
            if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() == self.numel:
                return tensor.detach().view(-1)
        return None

    def copy_to(self, host: Tensor) -> None:
        """Fill `host` (numel,), zero where no part lies, from wherever the parts are."""
        for start, tensor, strides in self.parts:
            torch.as_strided(host, tensor.shape, strides, start).copy_(tensor.detach(), non_blocking=True)


@dataclass(frozen=True)
class Share:
    """A leaf of the tree that is one rank's `here` of a vector of `total` elements."""

    part: Tensor
    here: slice
    total: int


@dataclass
class Packed:
    """One rank's state: the tree as text, and its vectors by name. fault: why there is none, for all ranks to hear."""

    text: str
    vectors: dict[str, Vector]
    fault: tuple[str, str] | None = None


def pack(tree: Mapping[str, Any], flat: FlatParameters) -> Packed:
    """Lay a state out. Raises: SlowmoError for something that a checkpoint cannot hold, with its place.

    A tensor below "optimizer/state/PARAMETER/KEY" with the parameter's shape goes where the parameter lies in `flat`,
    into the vector optimizer/KEY/DTYPE. What stands below a key in WHOLE is a vector already: {"z": {"float32": ...}}
    is z/float32. Every other one goes behind those before it, into FIRST_WORD/DTYPE (optimizer_other/DTYPE).
    """
    vectors: dict[str, Vector] = {}
    entries = {e.name: (e, view) for e, view in zip(flat.entries, flat.views(flat.buffers), strict=True)}

    def place(path: list[str], t: Tensor) -> list[Any]:
        if t.layout != torch.strided or t.dtype == torch.complex128 or t.is_quantized:
            raise _refused(path, f"a {t.layout} tensor of {t.dtype}")
        kind = _name(t.dtype)
        strides: Sequence[int] = torch.empty(t.shape, device="meta").stride()
        if path[:2] == ["optimizer", "state"] and len(path) == 4 and path[2] in entries:
            entry, view = entries[path[2]]
            buffer = flat.buffers[entry.buffer]
            name = f"optimizer/{_safe(path[3])}/{_name(buffer.dtype)}"
            vector = vectors.get(name) or Vector(name, t.dtype, buffer.numel())
            if t.shape == view.shape and vector.dtype == t.dtype and t.ndim:
                vectors[name] = vector
                vector.add(entry.start, t, view.stride())
                return [name, entry.start, list(t.shape), list(view.stride()), kind, t.device.type != "cpu"]
        if path[0] in WHOLE:
            name, start = "/".join(map(_safe, path)), 0
            vectors[name] = Vector(name, t.dtype, t.numel())
        else:
            name = f"{_safe(path[0])}{'_other' if path[0] == 'optimizer' else ''}/{kind}"
            vectors.setdefault(name, Vector(name, t.dtype))
            start = vectors[name].numel
            vectors[name].numel += t.numel()
        if t.numel():
            vectors[name].add(start, t, strides)
        return [name, start, list(t.shape), list(strides), kind, t.device.type != "cpu"]

    def encode(path: list[str], value: Any) -> Any:
        if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, np.generic)):
            return value
        if isinstance(value, Tensor):
            return {"$tensor": place(path, value)}
        if isinstance(value, Share):
            name = "/".join(map(_safe, path))
            vectors[name] = Vector(name, value.part.dtype, value.part.numel(), share=value.here, total=value.total)
            if value.part.numel():
                vectors[name].add(0, value.part, (1,))
            return {"$tensor": [name, 0, [value.total], [1], _name(value.part.dtype), value.part.device.type != "cpu"]}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
            kind = "$numpy" if isinstance(value, np.ndarray) else "$number"
            try:
                return {kind: place(path, torch.from_numpy(np.array(value, order="C")))}
            except (TypeError, ValueError):  # long doubles, foreign byte orders
                raise _refused(path, f"a numpy array of {value.dtype.str}") from None
        if isinstance(value, bytes):
            return {"$bytes": value.hex()}
        if isinstance(value, Mapping):
            if all(isinstance(k, str) and not k.startswith("$") for k in value):
                return {k: encode([*path, k], v) for k, v in value.items()}
            return {"$items": [[encode([*path, str(k)], k), encode([*path, str(k)], v)] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            items = [encode([*path, str(i)], v) for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        raise _refused(path, f"a value of type {type(value).__name__}")

    text = json.dumps({k: encode([k], v) for k, v in tree.items()})
    return Packed(text, {name: v for name, v in vectors.items() if v.numel or v.share is not None})


def unpack(text: str, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """The tree again. `read(vector)` gives a vector as a CPU tensor; the tree's tensors are views of those.

    A tensor that was on the device is marked so: `t.on_device`.
    """

    def tensor(place: list[Any]) -> Tensor:
        name, start, shape, strides, kind, on_device = place
        dtype = dtype_of(kind)
        empty = 0 in shape
        found = torch.empty(shape, dtype=dtype) if empty else torch.as_strided(read(name), shape, strides, start)
        found.on_device = on_device  # type: ignore[attr-defined]
        return found

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        match value:
            case {"$tensor": place}:
                return tensor(place)
            case {"$numpy": place}:
                return tensor(place).contiguous().numpy()
            case {"$number": place}:
                return tensor(place).numpy()[()]
            case {"$bytes": text}:
                return bytes.fromhex(text)
            case {"$tuple": items}:
                return tuple(decode(v) for v in items)
            case {"$items": items}:
                return {decode(k): decode(v) for k, v in items}
        return {k: decode(v) for k, v in value.items()}

    return decode(json.loads(text))


def to_stored(t: Tensor) -> Tensor:
    """A vector in a type that HDF5 knows: itself, or its bits as whole numbers (bfloat16 and the like)."""
    return t if t.dtype in PLAIN else t.view(STORED[t.dtype.itemsize])


def dtype_of(name: str) -> torch.dtype:
    """The torch type of that name. Raises: SlowmoError where this torch has none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SlowmoError(f"The checkpoint holds {name}, a type that this torch does not have.", "Use a newer torch.")
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _safe(word: str) -> str:
    return word.replace("/", ":")


def _refused(path: list[str], what: str) -> SlowmoError:
    return SlowmoError(
        f"A checkpoint cannot hold {what} ({'/'.join(path)}).",
        "It holds numbers, text, dense tensors, numpy arrays, and lists, tuples and dictionaries of them.",
    )
