"""The base algorithms: one inner step at one worker.

A base is a frozen description; all that changes is in `State`. Push-sum is kept in "z form": `z` is the de-biased
model and `w` the push-sum weight, the numerator being w * z (Assran et al., ICML 2019, Algorithm 1, has x = w z):

    send      the payload is z, and with it goes the weight p * w;  then w = p_self * w
    step      z -= (gamma / w) * d                (the numerator moves by gamma * d)
    receive   z += rw / (w + rw) * (rz - z);  w += rw

Invariants: the weights, in flight included, sum to m; so do the numerators to their total.

Where messages are rounded (`State.wire`), what travels is Q(z), and the invariants still hold: D-PSGD adds
W_ij (Q(x_j) - Q(x_i)), whose sum over workers is 0 since W is symmetric; under push-sum the sender keeps what rounding
took, w z = (what it sends) Q(z) + (what it keeps) z', so z' = z + p / p_self (z - Q(z)), where p + p_self = 1.
(No graph has p_self = 0: `Topology` refuses it.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from .comm.core import Endpoint
from .errors import UsageError
from .flat import Packet
from .slowmo import PIECE
from .state import Flight, State
from .topology import Topology, load, require_symmetric

Update = Callable[[float], None]  # the optimizer's step, with its learning rates times the argument


class Base(ABC):
    """One inner step. `remaining` counts the steps to the round's exact average, this one included (inf: none)."""

    communicates: ClassVar[bool] = True  # False: workers meet only where they are averaged
    averages_gradients: ClassVar[bool] = False  # over all workers, while they are computed (buckets.py)

    def bind(self, ranks: int) -> Base:
        """The same base with its graph made for so many ranks. Raises: SlowmoError where it cannot be."""
        return self

    def exchanges(self, steps: float) -> bool:
        """Whether anything is exchanged in a round of so many steps."""
        return self.communicates

    def before_gradient(self, s: State, comm: Endpoint, remaining: float) -> None:
        """Post what can travel while the gradient is computed."""

    @abstractmethod
    def step(self, s: State, comm: Endpoint, update: Update, remaining: float) -> None:
        """The optimizer's step and the exchange that belongs to it."""

    def drain(self, s: State, comm: Endpoint) -> None:
        """Take in everything in flight."""

    def post_again(
        self, s: State, comm: Endpoint, phase: int, age: int, sent: float, weight: float, vectors: Sequence[Tensor]
    ) -> None:
        """Send again, after a resume, what was in flight when the state was saved. Changes neither w nor phase."""
        raise NotImplementedError(f"{type(self).__name__} has nothing in flight")


@dataclass(frozen=True)
class AllReduce(Base):
    """AR-SGD, AR-Adam: the optimizer's step on gradients that were averaged over all workers."""

    averages_gradients = True

    def step(self, s: State, comm: Endpoint, update: Update, remaining: float) -> None:
        update(1.0)


@dataclass(frozen=True)
class Local(Base):
    """Local SGD, Local Adam: the optimizer's step alone (Stich, ICLR 2019)."""

    communicates = False

    def step(self, s: State, comm: Endpoint, update: Update, remaining: float) -> None:
        update(1.0)


@dataclass(frozen=True)
class _Gossip(Base):
    topology: str | Topology = "exponential"

    def bind(self, ranks: int) -> _Gossip:
        graph = load(self.topology, ranks) if isinstance(self.topology, str) else self.topology
        if graph.ranks != ranks:
            raise UsageError(
                f"Topology {graph.name} is for {graph.ranks} ranks; this job has {ranks}.",
                f"Start {graph.ranks} ranks, or choose a family, which fits any number.",
            )
        return replace(self, topology=graph)

    @property
    def graph(self) -> Topology:
        assert isinstance(self.topology, Topology), "bind() comes first"
        return self.topology

    def _post(self, s: State, comm: Endpoint) -> Flight:
        """Send a snapshot of z and w to this step's peers."""
        s.in_flight = self._sent(s, comm, s.phase, s.z, s.w)
        s.phase += 1
        return s.in_flight

    def post_again(
        self, s: State, comm: Endpoint, phase: int, age: int, sent: float, weight: float, vectors: Sequence[Tensor]
    ) -> None:
        s.in_flight = replace(self._sent(s, comm, phase, vectors, weight), sent=sent, age=age)

    def _sent(self, s: State, comm: Endpoint, phase: int, vectors: Sequence[Tensor], weight: float) -> Flight:
        to = [peer for peer, _ in self.graph.sends(phase, comm.rank)]
        sources = [peer for peer, _ in self.graph.receives(phase, comm.rank)]
        packet, received = s.packet(), [s.packet().bytes for _ in sources]
        packet.weight = weight
        exchanges = []
        for piece in packet.pieces():
            with comm.span("copies", "snapshot"):
                packet.fill(vectors, piece)
            into = [r[piece.bytes] for r in received]
            exchanges.append(comm.exchange(packet.bytes[piece.bytes], to, sources, into))
        return Flight(exchanges, received, packet, phase)

    def _arrived(
        self, s: State, comm: Endpoint
    ) -> Iterator[tuple[list[tuple[int, slice]], list[tuple[Packet, float]]]]:
        """Wait for the exchange in flight, piece by piece: which parts of the vectors are here, and in what packets.

        With each packet comes the p of its edge. The weights are here with the first piece.
        """
        assert s.in_flight is not None
        flight, s.in_flight = s.in_flight, None
        edges = self.graph.receives(flight.phase, comm.rank)
        packets = [(s.packet(r), p) for r, (_, p) in zip(flight.received, edges, strict=True)]
        for piece, exchange in zip(flight.packet.pieces(), flight.exchanges, strict=True):
            exchange.wait()
            yield piece.parts, packets
        s.spare += [flight.packet.bytes, *flight.received]


@dataclass(frozen=True)
class DPSGD(_Gossip):
    """D-PSGD (Lian et al., NeurIPS 2017): x = W x - gamma * d(x), W symmetric and doubly stochastic.

    W x needs only the x before the gradient, so the exchange runs beside the gradient.
    """

    topology: str | Topology = "ring-bidirectional"

    def bind(self, ranks: int) -> DPSGD:
        bound = super().bind(ranks)
        require_symmetric(bound.graph)
        assert isinstance(bound, DPSGD)
        return bound

    def before_gradient(self, s: State, comm: Endpoint, remaining: float) -> None:
        if remaining > 1:  # what is exchanged in a round's last step, the exact average would undo
            self._post(s, comm)

    def step(self, s: State, comm: Endpoint, update: Update, remaining: float) -> None:
        update(1.0)
        if s.in_flight is not None:
            before = s.in_flight.packet.vectors
            for parts, packets in self._arrived(s, comm):
                for (i, part), (packet, p) in product(parts, packets):
                    z, theirs, mine = s.z[i][part], packet.vectors[i][part], before[i][part]
                    z.add_(theirs.to(z.dtype).sub_(mine), alpha=p)

    def drain(self, s: State, comm: Endpoint) -> None:
        if s.in_flight is not None:
            list(self._arrived(s, comm))  # W x is taken in only together with its gradient


@dataclass(frozen=True)
class OSGP(_Gossip):
    """Overlapped SGP (Assran et al. 2019): the exchange is posted before the gradient and taken in later.

    delay: optimizer steps between posting and taking in. With 1 and one peer, X <- P X - gamma G(X); with
    0 it is SGP. One exchange is in flight at a time, taken in after exactly `delay` steps, so that a
    run can be repeated bit for bit.
    """

    delay: int = 1

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise UsageError(f"delay = {self.delay} would take in what was not yet sent.", "Give 0 or more.")

    def exchanges(self, steps: float) -> bool:
        return self.delay < steps or not self.delay

    def before_gradient(self, s: State, comm: Endpoint, remaining: float) -> None:
        if self.delay and s.in_flight is None and remaining > self.delay:
            self._push(s, comm)

    def step(self, s: State, comm: Endpoint, update: Update, remaining: float) -> None:
        self._keep_rest(s)
        update(1 / s.w)
        if not self.delay and remaining > 1:  # what a round's last step sends, the exact average would undo
            self._push(s, comm)
            self._keep_rest(s)
        if s.in_flight is not None:
            s.in_flight.age += 1
            if s.in_flight.age >= self.delay:
                self.drain(s, comm)

    def _push(self, s: State, comm: Endpoint) -> None:
        """Send: z stays as it is, and w keeps the part of itself that was not sent."""
        kept = self.graph.self_weight(s.phase, comm.rank)
        flight = self._post(s, comm)
        flight.sent, s.w = (1 - kept) * s.w, kept * s.w

    def _keep_rest(self, s: State) -> None:
        """What rounding took from a message is kept, before z changes: z' = z + p / p_self (z - Q(z)).

        Not when it is posted, so that the gradient beside it is taken at z, and to undo the posting is to forget it.
        """
        if s.in_flight is not None and s.in_flight.age == 0:
            for z, sent in zip(s.z, s.in_flight.packet.vectors, strict=True):
                if sent.dtype != z.dtype:
                    mix(z, sent, -s.in_flight.sent / s.w)

    def drain(self, s: State, comm: Endpoint) -> None:
        if s.in_flight is None:
            return
        self._keep_rest(s)
        shares: list[float] = []
        for parts, packets in self._arrived(s, comm):
            if not shares:
                for packet, p in packets:
                    rw = p * packet.weight
                    shares.append(rw / (s.w + rw))
                    s.w += rw
            with comm.span("copies", "mixing"):
                for (i, part), ((packet, _), share) in product(parts, list(zip(packets, shares, strict=True))):
                    mix(s.z[i][part], packet.vectors[i][part], share)


def mix(z: Tensor, other: Tensor, share: float) -> None:
    """z += share * (other - z), in pieces, so that what is widened on the way stays in the cache."""
    for part, theirs in zip(z.split(PIECE), other.split(PIECE), strict=True):
        torch.lerp(part, theirs.to(z.dtype), share, out=part)


@dataclass(frozen=True)
class SGP(OSGP):
    """Stochastic gradient push (Assran et al. 2019): optimizer step, then push-sum mixing, X <- P (X - gamma G)."""

    delay: int = field(default=0, init=False)
