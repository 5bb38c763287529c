"""The restart from a new anchor, while the next forward pass already computes.

After the outer step each rank has 1/m of the new x0. The rest arrives the model's first layers first, and each layer
waits for its own parameters alone. What comes out is the same to the bit; only who reads parameters without calling
the layer they belong to must wait for all of them. Which those are is looked for in the model's first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .comm import Endpoint, Operation
from .flat import FlatParameters


class Restart:
    """Lets the layers of `model` wait for their parts of vectors on their way.

    complete: called once all are here, by the rank that trains, at the end of the forward pass at the latest.
    """

    def __init__(self, model: nn.Module, flat: FlatParameters, comm: Endpoint, complete: Callable[[], None]):
        self._flat, self._comm, self._complete = flat, comm, complete
        self._number = {id(p): i for i, p in enumerate(flat.parameters)}
        self._arriving: dict[int, tuple[Operation[Tensor], set[int]]] = {}  # by vector: its gather, the shards here
        self._early = set(range(len(flat.parameters)))  # to wait for before any layer: all, until it is known
        self._watch: _Watch | None = None
        self.is_safe = False  # a forward pass has been watched; before, nobody knows which layer reads what
        self._hooks = [model.register_forward_hook(self._after, always_call=True)]
        for module in model.modules():
            # A module with parameters of its own may read those of its children too (attention's projections).
            own = any(True for _ in module.parameters(recurse=False))
            needs = frozenset(self._number[id(p)] for p in module.parameters() if own and id(p) in self._number)
            self._hooks.append(module.register_forward_pre_hook(partial(self._before, needs, module is model)))

    def close(self) -> None:
        """Wait for all that is under way, and leave the model alone."""
        self.finish()
        for hook in self._hooks:
            hook.remove()

    @property
    def is_under_way(self) -> bool:
        """Whether something is still arriving."""
        return bool(self._arriving)

    def begin(self, number: int, vector: Tensor) -> None:
        """Start to gather a vector, of which this rank has its shard."""
        here: set[int] = set()
        self._arriving[number] = self._comm.start_all_gather(vector, "restart from the new anchor", here.add), here

    def finish(self) -> None:
        """Wait for all that is under way."""
        if self._arriving:
            for operation, _ in self._arriving.values():
                operation.wait()
            self._arriving.clear()
            self._complete()

    def _before(self, needs: frozenset[int], is_model: bool, *_: Any) -> None:
        if is_model and not self.is_safe and self._watch is None:
            self._watch = _Watch(self._number)
            self._watch.__enter__()
        if self._watch is not None:
            self._watch.opened |= needs
        if self._arriving:
            for i in sorted(self._early | needs):
                self._wait_for(i)

    def _wait_for(self, i: int) -> None:
        """Until parameter i is here."""
        e = self._flat.entries[i]
        if e.buffer not in self._arriving:
            return
        operation, here = self._arriving[e.buffer]
        each = -(-self._flat.buffers[e.buffer].numel() // self._comm.size)
        shards = set(range(e.start // each, (e.start + e.numel - 1) // each + 1))
        if not shards <= here:
            self._comm.wait_until(lambda: shards <= here, operation)

    def _after(self, *_: Any) -> None:
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.__exit__(None, None, None)
            self._early -= watch.used_after_opening()
            self.is_safe = True
        with torch.no_grad():
            self.finish()


class _Watch(TorchFunctionMode):
    """Sees which parameters are used, and whether a layer that waits for them was entered before."""

    def __init__(self, number: Mapping[int, int]):
        super().__init__()
        self._number = number
        self.opened: set[int] = set()
        self._used: set[int] = set()
        self._too_soon: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in _tensors((args, kwargs or {})):
            if (i := self._number.get(id(t))) is not None:
                self._used.add(i)
                if i not in self.opened:
                    self._too_soon.add(i)
        return func(*args, **(kwargs or {}))

    def used_after_opening(self) -> set[int]:
        """The parameters that nobody read before a layer that waits for them was entered."""
        return self._used - self._too_soon


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
