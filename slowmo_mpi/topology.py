"""Who sends to whom, with what weight: a frozen table, its checks, and `load`, which makes one from a name.

A topology is data. It knows nothing of MPI or of algorithms; the dense matrix of a step is the oracle that
both are tested against. The formulas are in `families`, graphs that are no formula in topologies/*.toml.
"""

import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slowmo_mpi import shipped
from slowmo_mpi.errors import UsageError, did_you_mean
from slowmo_mpi.families import FAMILIES, build

__all__ = ["FAMILIES", "Edge", "Topology", "files", "load"]

SUM_TOLERANCE = 1e-9  # how far from 1 the weights that a rank gives away and keeps may sum
STEP_LIMIT = 1_000_000  # where steps_to_average stops looking

Table = tuple[tuple[tuple[tuple[int, float], ...], ...], ...]  # step, rank, (peer, weight)


class Edge(NamedTuple):
    """In one step `target` receives `weight` times the mass of `source`; a self-edge is what a rank keeps."""

    source: int
    target: int
    weight: float


@dataclass(frozen=True)
class Topology:
    """A cycle of column-stochastic matrices as a table of edges: X <- P_k X, P_k[target, source] = weight.

    `steps` has one tuple of edges per step of the cycle, self-edges included. Construction checks that the
    weights are positive and finite, that what a rank keeps and sends sums to 1 (mass is conserved, which is
    all that push-sum needs [Kempe et al. 2003]), that every rank keeps something, and that over a cycle
    everyone hears from everyone. The last two make the product of a cycle primitive, and its second
    eigenvalue smaller than 1 in modulus (Perron-Frobenius), without computing it.

    Raises UsageError with the first fault, naming step, rank and number.
    """

    name: str
    ranks: int
    steps: tuple[tuple[Edge, ...], ...]

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UsageError(f"A topology for {self.ranks} ranks makes no sense.", "Give at least 1 rank.")
        if not self.steps:
            raise UsageError(f"Topology {self.name!r} has no steps.", "Give it at least one step.")
        for k, edges in enumerate(self.steps):
            self._check_step(k, edges)
        self._check_connected()
        # Connected and keeping something is < 1 in exact arithmetic; weights of 1e-12 can still be hopeless.
        if self.ranks <= 64 and self.contraction > 1 - SUM_TOLERANCE:
            raise UsageError(
                f"Topology {self.name!r} hardly mixes: a cycle of {self.period} steps leaves "
                f"{self.contraction:.12g} of a difference between the ranks.",
                "Give the edges between its parts larger weights.",
            )

    def _check_step(self, k: int, edges: Sequence[Edge]) -> None:
        n = self.ranks
        for source, target, weight in edges:
            if not (0 <= source < n and 0 <= target < n):
                far = source if not 0 <= source < n else target
                raise self._fault(k, f"edge {source} -> {target} names rank {far}", f"Ranks are 0 to {n - 1} of {n}.")
            if not 0 < weight < math.inf:
                raise self._fault(
                    k,
                    f"edge {source} -> {target} has weight {weight}",
                    "Weights are positive finite numbers; leave an edge out to send nothing.",
                )
        sources, targets, weights = self._arrays[k]
        keys, counts = np.unique(sources * n + targets, return_counts=True)
        if len(keys) < len(edges):
            source, target = divmod(int(keys[counts > 1][0]), n)
            raise self._fault(
                k,
                f"edge {source} -> {target} is there {int(counts.max())} times",
                "Give every edge once a step, with the sum of its weights.",
            )
        keeps = np.zeros(n, dtype=bool)
        keeps[sources[sources == targets]] = True
        if not keeps.all():
            rank = int(np.argmin(keeps))
            sent = float(weights[sources == rank].sum())
            raise self._fault(
                k,
                f"rank {rank} sends {sent:.12g} and keeps nothing",
                f"Make the weights from rank {rank} to others sum to less than 1.",
            )
        sums = np.bincount(sources, weights, minlength=n)
        worst = int(np.argmax(np.abs(sums - 1)))
        if abs(sums[worst] - 1) > SUM_TOLERANCE:
            raise self._fault(
                k,
                f"what rank {worst} keeps and sends sums to {sums[worst]:.12g}",
                f"Make the weights from rank {worst} sum to 1, its own share included.",
            )

    def _fault(self, k: int, fault: str, hint: str) -> UsageError:
        return UsageError(f"Topology {self.name!r}, step {k} of 0-{self.period - 1}: {fault}.", hint)

    def _check_connected(self) -> None:
        out: list[set[int]] = [set() for _ in range(self.ranks)]
        into: list[set[int]] = [set() for _ in range(self.ranks)]
        for sources, targets, _ in self._arrays:
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                out[source].add(target)
                into[target].add(source)
        for neighbours, forward in ((out, True), (into, False)):
            missing = sorted(set(range(self.ranks)) - _reach(neighbours))
            if missing:
                deaf, mute = (missing[0], 0) if forward else (0, missing[0])
                raise UsageError(
                    f"Topology {self.name!r} is not connected: rank {deaf} can never hear from rank {mute}, "
                    f"directly or through others ({len(missing)} of {self.ranks} ranks are cut off so).",
                    f"Add an edge on the way from rank {mute} to rank {deaf}, in any step.",
                )

    @property
    def period(self) -> int:
        """The number of steps of a cycle."""
        return len(self.steps)

    @cached_property
    def _arrays(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Each step's sources, targets (int64) and weights (float64)."""
        return [
            (
                np.fromiter((e[0] for e in edges), np.int64, len(edges)),
                np.fromiter((e[1] for e in edges), np.int64, len(edges)),
                np.fromiter((e[2] for e in edges), np.float64, len(edges)),
            )
            for edges in self.steps
        ]

    @cached_property
    def _tables(self) -> tuple[Table, Table, tuple[tuple[float, ...], ...]]:
        """Sends, receives and self weights, by step and rank; built once, read at every training step."""
        sends, receives, keeps = [], [], []
        for edges in self.steps:
            out: list[list[tuple[int, float]]] = [[] for _ in range(self.ranks)]
            into: list[list[tuple[int, float]]] = [[] for _ in range(self.ranks)]
            keep = [0.0] * self.ranks
            for source, target, weight in edges:
                if source == target:
                    keep[source] = weight
                else:
                    out[source].append((target, weight))
                    into[target].append((source, weight))
            sends.append(tuple(tuple(sorted(peers)) for peers in out))
            receives.append(tuple(tuple(sorted(peers)) for peers in into))
            keeps.append(tuple(keep))
        return tuple(sends), tuple(receives), tuple(keeps)

    def sends(self, step: int, rank: int) -> tuple[tuple[int, float], ...]:
        """(peer, weight) of every message that `rank` sends at `step` (modulo the period), sorted by peer."""
        return self._tables[0][step % self.period][rank]

    def receives(self, step: int, rank: int) -> tuple[tuple[int, float], ...]:
        """(peer, weight) of every message that `rank` receives at `step`, sorted by peer."""
        return self._tables[1][step % self.period][rank]

    def self_weight(self, step: int, rank: int) -> float:
        """The share of its mass that `rank` keeps at `step`: 1 minus what it sends."""
        return self._tables[2][step % self.period][rank]

    def matrix(self, step: int) -> np.ndarray:
        """P of this step, float64 (n, n), P[target, source] = weight; its columns sum to 1."""
        sources, targets, weights = self._arrays[step % self.period]
        dense = np.zeros((self.ranks, self.ranks))
        dense[targets, sources] = weights
        return dense

    def mix(self, step: int, x: np.ndarray) -> np.ndarray:
        """P_step x for x (n, columns), without a dense P where the step has few edges."""
        sources, targets, weights = self._arrays[step % self.period]
        if len(weights) > 8 * self.ranks:
            return self.matrix(step) @ x
        order = np.argsort(targets, kind="stable")
        # Every rank keeps something, so every target occurs and `starts` has one segment for each.
        starts = np.searchsorted(targets[order], np.arange(self.ranks))
        return np.add.reduceat(weights[order, None] * x[sources[order]], starts, axis=0)

    @cached_property
    def cycle(self) -> np.ndarray:
        """The product of a cycle, P_(period-1) ... P_1 P_0, float64 (n, n)."""
        product = np.eye(self.ranks)
        for k in range(self.period):
            product = self.mix(k, product)
        return product

    @cached_property
    def symmetric(self) -> bool:
        """Whether every step's matrix equals its transpose: what D-PSGD asks for."""
        n = self.ranks
        for sources, targets, weights in self._arrays:
            here, there = np.argsort(sources * n + targets), np.argsort(targets * n + sources)
            if not (
                np.array_equal(sources[here], targets[there])
                and np.array_equal(targets[here], sources[there])
                and np.allclose(weights[here], weights[there], rtol=0, atol=1e-12)
            ):
                return False
        return True

    @cached_property
    def doubly_stochastic(self) -> bool:
        """Whether every step's rows sum to 1 too: then push-sum's w stays 1."""
        rows = [np.bincount(targets, weights, minlength=self.ranks) for _, targets, weights in self._arrays]
        return bool(np.allclose(rows, 1, rtol=0, atol=SUM_TOLERANCE))

    @cached_property
    def contraction(self) -> float:
        """The second-largest |eigenvalue| of a cycle's product M; 0 = the exact average in finite time.

        It is the spectral radius of A = M on the vectors whose sum is 0, and lim |A^k|^(1/k) (Gelfand), taken
        by squaring A forty times. A dense eigenvalue solver would say 1e-16^(1/b) where M has a nilpotent
        block of size b.
        """
        n = self.ranks
        power = self.cycle - self.cycle.mean(axis=1, keepdims=True)
        log_norm, exponent = 0.0, 1
        while True:
            # Rounding brings back a little of the eigenvalue 1, which would grow: project it out each time.
            power -= power.mean(axis=0, keepdims=True)
            norm = float(np.linalg.norm(power))
            if norm <= 4 * n * np.finfo(float).eps:
                return 0.0
            log_norm += math.log(norm)
            if exponent == 1 << 40:
                return math.exp(log_norm / exponent)
            power /= norm
            power = power @ power
            log_norm, exponent = 2 * log_norm, 2 * exponent

    @property
    def spectral_gap(self) -> float:
        """1 - contraction: 1 is the exact average in finite time, near 0 is slow."""
        return 1 - self.contraction

    def errors(self) -> Iterator[float]:
        """After 0, 1, 2, ... steps: push-sum's de-biased error max |diag(1/(M 1)) M - J/n|, without end."""
        product = np.eye(self.ranks)
        step = 0
        while True:
            yield _error(product)
            product = self.mix(step, product)
            step += 1

    def steps_to_average(self, tolerance: float = 1e-6, limit: int = STEP_LIMIT) -> int | None:
        """The fewest steps after which the de-biased error is at most `tolerance`; None beyond `limit`.

        A step replaces every de-biased value by a weighted mean of such values, so that the error never
        grows: whole cycles are searched by halving, on powers of the cycle's product.
        """
        if _error(np.eye(self.ranks)) <= tolerance:
            return 0
        powers = [self.cycle]
        while _error(powers[-1]) > tolerance and self.period << (len(powers) - 1) <= limit:
            powers.append(powers[-1] @ powers[-1])
        product, cycles = np.eye(self.ranks), 0
        for j in reversed(range(len(powers))):
            longer = powers[j] @ product
            if _error(longer) > tolerance:
                product, cycles = longer, cycles + (1 << j)
        for k in range(self.period):
            product = self.mix(k, product)
            if _error(product) <= tolerance:
                steps = cycles * self.period + k + 1
                return steps if steps <= limit else None
        return None


def _error(product: np.ndarray) -> float:
    return float(np.abs(product / product.sum(axis=1, keepdims=True) - 1 / len(product)).max())


def _reach(neighbours: list[set[int]]) -> set[int]:
    """The ranks that can be reached from rank 0."""
    seen, front = {0}, [0]
    while front:
        for j in neighbours[front.pop()] - seen:
            seen.add(j)
            front.append(j)
    return seen


def load(spec: str, ranks: int, folder: Path | None = None) -> Topology:
    """The topology that `spec` names, for this many ranks.

    `spec` is "family", "family:key=value,key=value", or a path that ends in .toml, looked for from the
    working directory, from `folder`, and among the project's own. Raises UsageError with what to type.
    """
    if ranks < 1:
        raise UsageError(f"A topology for {ranks} ranks makes no sense.", "Give at least 1 rank.")
    steps = _read(spec, ranks, folder) if spec.endswith(".toml") else build(spec, ranks)
    return Topology(spec, ranks, tuple(_with_self(step, ranks) for step in steps))


def _with_self(step: Iterable[tuple[int, int, float]], ranks: int) -> tuple[Edge, ...]:
    """The edges of a step and, for every rank that has no self-edge, one with what is left of 1."""
    edges = [Edge(*edge) for edge in step]
    sent: list[list[float]] = [[] for _ in range(ranks)]
    given = set()
    for source, target, weight in edges:
        if 0 <= source < ranks:  # a rank out of range is for the checks to report
            sent[source].append(weight)
            if source == target:
                given.add(source)
    left = {rank: 1 - math.fsum(weights) for rank, weights in enumerate(sent) if rank not in given}
    # Nothing or less left makes no edge, so that the check says "sends 1.2 and keeps nothing".
    edges += [Edge(rank, rank, share) for rank, share in left.items() if share > SUM_TOLERANCE]
    return tuple(edges)


def require_symmetric(graph: Topology) -> None:
    """Refuse a graph that D-PSGD cannot use. Raises: UsageError."""
    if not graph.symmetric:
        raise UsageError(
            f"D-PSGD needs a symmetric graph; {graph.name} is directed.",
            "Choose ring-bidirectional, torus, hypercube, base or complete, or the algorithm sgp.",
        )


GOSSIP = {"dpsgd": True, "sgp": False, "osgp": False}
"""The algorithms that use a graph, and whether it must be symmetric."""


def for_algorithm(algorithm: str, spec: str, ranks: int) -> Topology | None:
    """The graph that `algorithm` will use, None for one that uses none. Raises: UsageError where it cannot be used."""
    if algorithm not in GOSSIP:
        return None
    graph = load(spec, ranks)
    if GOSSIP[algorithm]:
        require_symmetric(graph)
    return graph


def files() -> list[Path]:
    """The project's own graph files, sorted."""
    return sorted(shipped.folder("topologies").glob("*.toml"))


def _find(spec: str, folder: Path | None) -> Path:
    path = Path(spec)
    # "topologies/star.toml" and "star.toml" both mean the project's file, wherever one stands.
    own = shipped.folder("topologies")
    places = [path, *([folder / path] if folder else []), own.parent / path, own / path]
    for place in places:
        if place.is_file():
            return place
    raise UsageError(
        f"There is no topology file {spec!r} (looked for {', '.join(map(str, dict.fromkeys(places)))}).",
        did_you_mean(spec, [own.name for own in files()]).strip()
        or "Check the path, or type slowmo topology list for ours.",
    )


def describe(path: Path) -> dict[str, Any]:
    """What a graph file says of itself: its keys without the steps."""
    return {key: value for key, value in _parse(path).items() if key != "step"}


def ranks_of(spec: str, folder: Path | None = None) -> int:
    """The number of ranks that a graph file is made for."""
    return _made_for(spec, _parse(_find(spec, folder)))


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"Topology file {path} is not valid TOML: {error}.", "Correct it there.") from None
    except OSError as error:
        raise UsageError(
            f"Topology file {path} cannot be read: {error.strerror}.", "Check the file's permissions."
        ) from None


def _read(spec: str, ranks: int, folder: Path | None) -> list[list[tuple[int, int, float]]]:
    """The steps of a file, with every value's type checked; the graph itself is Topology's to check."""
    content = _parse(_find(spec, folder))
    known = ("ranks", "description", "step")
    for key in content:
        if key not in known:
            raise UsageError(
                f"Topology file {spec!r} has an unknown key {key!r}.",
                did_you_mean(key, known).strip() or f"The keys are {', '.join(known)}.",
            )
    made_for = _made_for(spec, content)
    if made_for != ranks:
        raise UsageError(
            f"Topology file {spec!r} is made for {made_for} ranks, and there are {ranks}.",
            f"Start {made_for} ranks, or use a family such as base, which takes any number.",
        )
    tables = content.get("step", [])
    if not isinstance(tables, list) or not tables:
        raise UsageError(
            f"Topology file {spec!r} has no [[step]].", "Write [[step]] and under it edges = [[0, 1, 0.5]]."
        )
    return [_read_step(spec, k, table) for k, table in enumerate(tables)]


def _made_for(spec: str, content: dict[str, Any]) -> int:
    ranks: Any = content.get("ranks")
    if not _is_int(ranks) or ranks < 1:
        raise UsageError(
            f"Topology file {spec!r} does not say for how many ranks it is (ranks = {ranks!r}).",
            "Write for example ranks = 8 above the first [[step]].",
        )
    return int(ranks)


def _read_step(spec: str, k: int, table: Any) -> list[tuple[int, int, float]]:
    edges = table.get("edges") if isinstance(table, dict) else None
    if not isinstance(edges, list) or set(table) != {"edges"}:
        raise UsageError(
            f"Topology file {spec!r}, step {k}: a step has one key, edges, a list.",
            "Write for example edges = [[0, 1, 0.5], [1, 0, 0.5]].",
        )
    for edge in edges:
        if not (
            isinstance(edge, list)
            and len(edge) == 3
            and _is_int(edge[0])
            and _is_int(edge[1])
            and (_is_int(edge[2]) or isinstance(edge[2], float))
        ):
            raise UsageError(
                f"Topology file {spec!r}, step {k}: {edge!r} is not an edge.",
                "Write an edge as [source, target, weight], for example [0, 1, 0.5].",
            )
    return [(source, target, float(weight)) for source, target, weight in edges]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
