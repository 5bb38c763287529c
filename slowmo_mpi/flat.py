"""One flat vector: the trainable parameters in one contiguous buffer per dtype, the model's tensors views of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import SlowmoError

PIECE_BYTES, PIECES = 1 << 20, 16  # of a message: at least so long, about so many
ALIGN_BYTES = 64  # every parameter starts on a cache line, so that kernels see aligned memory


@dataclass(frozen=True)
class Entry:
    """Where a parameter lies: buffer number, offset and length in elements, optimizer group."""

    name: str
    buffer: int
    start: int
    numel: int
    group: int


class FlatParameters:
    """The trainable parameters of `model` as `buffers`, one vector (d,) per dtype.

    The model's parameters become views of the buffers (no copy is needed to send or to update them) with
    the strides they had, so channels-last weights stay channels-last. In a buffer the parameters of one
    optimizer group stand together: `spans[b]` lists (group, start, stop), covering the whole buffer.
    Gaps of padding hold zeros. Frozen and empty parameters are left where they are.

    groups: the optimizer's parameter groups, lists of parameters. parts: the vectors are padded to so many equal ones.
    Raises: SlowmoError for parameters that are sparse, complex, on several devices, trainable but in no
    group, or in a group but not in the model.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], parts: int = 1):
        named = {p: name for name, p in model.named_parameters()}
        group_of = {p: g for g, members in enumerate(groups) for p in members}
        for p in group_of:
            if p not in named:
                raise SlowmoError(
                    f"The optimizer has a parameter of shape {tuple(p.shape)} that is not in the model.",
                    "Put everything that is trained into one torch.nn.Module and give that to SlowMo.",
                )
        trained = [p for p in named if p.requires_grad and p.numel()]
        for p in trained:
            if p not in group_of:
                raise SlowmoError(
                    f"Parameter {named[p]} is trainable but the optimizer does not have it.",
                    "Give it to the optimizer, or freeze it with requires_grad_(False).",
                )
            if p.layout != torch.strided or not p.is_floating_point():
                raise SlowmoError(
                    f"Parameter {named[p]} is {p.layout} {p.dtype}; only dense floating-point parameters are trained.",
                    "Use a dense, real parameter.",
                )
        if not trained:
            raise SlowmoError("The model has no trainable parameter.", "Unfreeze one with requires_grad_(True).")
        devices = {p.device for p in trained}
        if len(devices) > 1:
            raise SlowmoError(
                f"The model's parameters lie on several devices: {', '.join(sorted(map(str, devices)))}.",
                "A rank owns one device: move the model there with model.to(comm.device).",
            )

        self._model, self._groups = model, [list(members) for members in groups]
        order = {p: i for i, p in enumerate(trained)}
        self.parameters = sorted(trained, key=lambda p: (str(p.dtype), group_of[p]))  # stable: model order within
        self.place = [order[p] for p in self.parameters]  # in the model's own order
        self.buffers: list[Tensor] = []
        self.spans: list[list[tuple[int, int, int]]] = []
        self.entries: list[Entry] = []
        device = devices.pop()
        for dtype in dict.fromkeys(p.dtype for p in self.parameters):
            members = [p for p in self.parameters if p.dtype == dtype]
            align = ALIGN_BYTES // dtype.itemsize
            offset = 0
            spans: list[tuple[int, int, int]] = []
            for p in members:
                group = group_of[p]
                stop = offset + -(-p.numel() // align) * align
                self.entries.append(Entry(named[p], len(self.buffers), offset, p.numel(), group))
                if spans and spans[-1][0] == group:
                    spans[-1] = (group, spans[-1][1], stop)
                else:
                    spans.append((group, offset, stop))
                offset = stop
            offset = -(-offset // (align * parts)) * align * parts
            spans[-1] = (*spans[-1][:2], offset)
            self.buffers.append(torch.zeros(offset, dtype=dtype, device=device))
            self.spans.append(spans)
        with torch.no_grad():
            for p, view in zip(self.parameters, self.views(self.buffers), strict=True):
                view.copy_(p)
                p.data = view

    def views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Views of vectors laid out like `buffers`, one per parameter, in its shape and strides."""
        return [
            like_parameter(p, buffers[e.buffer], e.start) for p, e in zip(self.parameters, self.entries, strict=True)
        ]

    def check(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        """Raise SlowmoError if what is trained is no longer what lies in the buffers.

        (The model was moved or rebuilt, a parameter was unfrozen, the optimizer was given others: those would be
        trained without ever being exchanged.)
        """
        mine = set(map(id, self.parameters))
        for name, p in self._model.named_parameters():
            if p.requires_grad and p.numel() and id(p) not in mine:
                raise SlowmoError(
                    f"Parameter {name} was added, replaced or unfrozen after SlowMo was made; it would train apart.",
                    "Change the model first, then make SlowMo (a new one, where training goes on with more).",
                )
        if any(len(a) != len(b) for a, b in zip(groups, self._groups, strict=False)) or len(groups) != len(
            self._groups
        ):
            raise SlowmoError(
                "The optimizer was given other parameters after SlowMo was made.",
                "Give it all parameters first, then make SlowMo.",
            )
        for i, e in enumerate(self.entries):
            if not self.holds(i):
                raise SlowmoError(
                    f"Parameter {e.name} was moved or replaced after SlowMo was made; its updates would be lost.",
                    "Move or convert the model first (model.to(...)), then make SlowMo.",
                )

    def holds(self, i: int) -> bool:
        """Whether parameter i still lies in its buffer."""
        e = self.entries[i]
        b = self.buffers[e.buffer]
        return self.parameters[i].data_ptr() == b.data_ptr() + e.start * b.element_size()

    def fingerprint(self) -> str:
        """What must be equal on all ranks: each parameter's name, place, shape, strides and dtype."""
        return repr(
            [(e, tuple(p.shape), p.stride(), str(p.dtype)) for e, p in zip(self.entries, self.parameters, strict=True)]
        )


def like_parameter(p: Tensor, memory: Tensor, start: int) -> Tensor:
    """A view of `memory` from `start` on, with the shape of p and its strides (where p is dense, else contiguous)."""
    return torch.as_strided(memory, p.shape, torch.empty_like(p, device="meta").stride(), start)


def wire_type(name: str) -> torch.dtype | None:
    """What the configuration calls comm.dtype; None for "float32": everything travels as it is."""
    return None if name == "float32" else {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def travels_as(dtype: torch.dtype, wire: torch.dtype | None) -> torch.dtype:
    """The type in which values of `dtype` travel: `wire` where that is narrower, else their own."""
    return wire if wire is not None and wire.itemsize < dtype.itemsize else dtype


def round_into(rounded: Tensor, x: Tensor) -> None:
    """rounded = x in rounded's type. Raises: SlowmoError where that is float16 and x is beyond its range."""
    rounded.copy_(x)
    # Never inf without a word. (bfloat16 has float32's range.)
    if rounded.dtype == torch.float16 != x.dtype and not bool(rounded.isfinite().all()):
        raise SlowmoError(
            f"A value of size {float(x.abs().max()):g} is to travel as float16, whose largest is 65504.",
            "Use bfloat16 (comm.dtype), which has float32's range; where the value is inf or nan, a lower rate.",
        )


@dataclass(frozen=True)
class Piece:
    """A run of a message's bytes, and what it is made of: (vector number, elements of that vector)."""

    bytes: slice
    parts: list[tuple[int, slice]]


class Packet:
    """One message: a snapshot of the flat vectors and of the push-sum weight, in one run of bytes.

    `vectors` and `weight` are views of `bytes` (uint8). A message in flight must not change, hence a copy. It travels
    in `pieces`, so that one is on the wire while another is copied or taken in.
    """

    def __init__(self, like: Sequence[Tensor], wire: torch.dtype | None = None, received: Tensor | None = None):
        """Room for a message of the vectors `like`, in the type `wire` where that is narrower than theirs.

        received: bytes that came in, to be read as such a message.
        """
        types = [travels_as(v.dtype, wire) for v in like]
        sizes = [v.numel() * t.itemsize for v, t in zip(like, types, strict=True)]
        if received is None:
            received = torch.empty(sum(sizes) + 8, dtype=torch.uint8, device=like[0].device)
        self.bytes = received
        pieces = self.bytes.split([*sizes, 8])
        self.vectors = [piece.view(t) for piece, t in zip(pieces, types, strict=False)]
        self._weight = pieces[-1].view(torch.float64)

    @property
    def weight(self) -> float:
        return float(self._weight)

    @weight.setter
    def weight(self, weight: float) -> None:
        self._weight.fill_(weight)

    def pieces(self) -> list[Piece]:
        """The message in pieces: first the last one, which has the weight, then the others from the start on."""
        total = self.bytes.numel()
        step = max(PIECE_BYTES, -(-total // (PIECES * ALIGN_BYTES)) * ALIGN_BYTES)
        *starts, last = range(0, total, step)
        return [self._piece(start, min(start + step, total)) for start in (last, *starts)]

    def _piece(self, start: int, stop: int) -> Piece:
        parts, offset = [], 0
        for number, v in enumerate(self.vectors):
            low, high = max(start - offset, 0), min(stop - offset, v.numel() * v.element_size())
            if low < high:
                parts.append((number, slice(low // v.element_size(), high // v.element_size())))
            offset += v.numel() * v.element_size()
        return Piece(slice(start, stop), parts)

    def fill(self, vectors: Sequence[Tensor], piece: Piece) -> None:
        """Copy a piece of `vectors` in."""
        for number, part in piece.parts:
            round_into(self.vectors[number][part], vectors[number][part])
