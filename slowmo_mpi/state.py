"""All mutable state of a worker in one object: whatever moves the trajectory is here, and nowhere else.

(The optimizer's buffers are in the optimizer, batch-norm buffers in the model.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .flat import FlatParameters, Packet
from .slowmo import Slow

if TYPE_CHECKING:
    from .comm import Operation


@dataclass
class Flight:
    """A gossip exchange that was posted and not yet taken in.

    exchanges: one per piece of the message; received: the messages coming in; packet: what this rank sent; sent: the
    push-sum weight that left with it (0 where no mass moves); phase: the step of the graph it belongs to; age:
    optimizer steps since it was posted.
    """

    exchanges: list[Operation[list[Tensor]]]
    received: list[Tensor]
    packet: Packet
    phase: int
    sent: float = 0.0
    age: int = 0


@dataclass
class Late:
    """The mean way x0 - xbar that the workers went in a round, on its way while the next one computes (CO2).

    rates: that round's learning rates, per group; coming: one function per flat vector, to be called once, that waits
    for the mean; means: those that are here.
    """

    rates: list[float]
    coming: list[Callable[[], Tensor]] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)

    def wait(self) -> list[Tensor]:
        """All means, once they are here."""
        while self.coming:
            self.means.append(self.coming.pop(0)())
        return self.means


@dataclass
class State:
    """One worker. `z` in the papers is `flat.buffers`: the de-biased parameters, which the model computes with.

    Where a worker is several ranks, all of them have the whole vectors, and `z` is the part of each that this one
    exchanges.
    """

    flat: FlatParameters
    z: list[Tensor]  # views of the flat buffers
    wire: torch.dtype | None = None  # the type that messages are rounded to; None: they travel as they are
    w: float = 1.0  # push-sum weight; the numerator is w * z
    phase: int = 0  # exchanges posted so far: the step of the graph
    in_flight: Flight | None = None
    step: int = 0  # optimizer steps done, k + t * tau
    round: int = 0  # outer steps done, t
    begun: int = -1  # the last step whose `before_gradient` was done
    slow: list[Slow] = field(default_factory=list)  # one per flat buffer; empty without an outer step
    late: Late | None = None  # with a delayed average only
    rate_sums: list[float] = field(default_factory=list)  # learning rates used in this round, summed, per group
    last_rates: list[float] = field(default_factory=list)
    peak_rates: list[float] = field(default_factory=list)  # the largest rate ever, per group
    errors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what rounding took (comm/compressed.py)
    spare: list[Tensor] = field(default_factory=list)  # memory of past messages, for the next ones

    def packet(self, received: Tensor | None = None) -> Packet:
        """A message to fill, in memory that was used before where there is some: fresh pages are slow.

        received: bytes that came in, to be read as a message.
        """
        return Packet(self.z, self.wire, self.spare.pop() if received is None and self.spare else received)
