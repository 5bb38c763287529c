"""The graphs that are formulas: one function a family, and the registry `FAMILIES`.

A builder takes the number of ranks n and its parameters, and returns the steps of one cycle. A step is a
list of (source, target, weight) triples without the self-edges: a rank keeps what it does not send. For
n = 1 every family is one step without edges. Everything is integer arithmetic, plain Python, and the same
on every machine; random tables come from `random.Random(seed)`, never from a global generator.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from slowmo_mpi.errors import UsageError, did_you_mean

Step = list[tuple[int, int, float]]


@dataclass(frozen=True)
class Parameter:
    """One `key=value` of a family; `default` None means chosen from n, as `doc` says."""

    name: str
    kind: type[int] | type[float]
    default: int | float | None
    doc: str
    low: float
    high: float = math.inf
    low_open: bool = False  # the value must exceed `low`, not just reach it

    @property
    def range(self) -> str:
        """The admitted values in words: "a whole number, at least 1"."""
        word = "a whole number" if self.kind is int else "a number"
        floor = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        return f"{word}, {floor}" + ("" if self.high == math.inf else f" and at most {self.high:g}")

    def parse(self, family: str, text: str) -> int | float:
        """The value that `text` says, or a UsageError that says what it may be."""
        try:
            value: int | float = self.kind(text)
        except ValueError:
            value = math.nan
        below = value <= self.low if self.low_open else value < self.low
        if math.isnan(value) or below or value > self.high or math.isinf(value):
            example = 0.5 if self.kind is float else max(int(self.low), 2)
            raise UsageError(
                f"Topology {family!r}: {self.name}={text} is not {self.range}.",
                f"Type for example {family}:{self.name}={example} ({self.doc}).",
            )
        return value


@dataclass(frozen=True)
class Family:
    """A named formula: `build(n, **parameters)` gives the steps of one cycle, or refuses n with a reason."""

    name: str
    doc: str
    build: Callable[..., list[Step]]
    parameters: tuple[Parameter, ...]
    admits: str


FAMILIES: dict[str, Family] = {}

SEED = Parameter("seed", int, 0, "the seed of the table", 0)


def _family(
    name: str, doc: str, *parameters: Parameter, admits: str = "any number of ranks"
) -> Callable[[Callable[..., list[Step]]], Callable[..., list[Step]]]:
    def register(build: Callable[..., list[Step]]) -> Callable[..., list[Step]]:
        FAMILIES[name] = Family(name, doc, build, parameters, admits)
        return build

    return register


def build(spec: str, ranks: int) -> list[Step]:
    """The steps of "family" or "family:key=value,key=value" for this many ranks."""
    name, _, rest = spec.partition(":")
    family = FAMILIES.get(name)
    if family is None:
        raise UsageError(
            f"There is no topology {name!r}.",
            did_you_mean(name, FAMILIES).strip()
            or f"Choose one of {', '.join(FAMILIES)}, or a file that ends in .toml.",
        )
    known = {p.name: p for p in family.parameters}
    values: dict[str, int | float] = {p.name: p.default for p in family.parameters if p.default is not None}
    given: set[str] = set()
    for item in rest.split(",") if ":" in spec else []:
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not key or not text:
            raise UsageError(
                f"Topology {spec!r}: {item!r} is not key=value.",
                f"Type {_usage(family)}.",
            )
        if key not in known:
            raise UsageError(
                f"Topology {name!r} has no parameter {key!r} (given as {key}={text}).",
                did_you_mean(key, known).strip() or f"Type {_usage(family)}.",
            )
        if key in given:
            raise UsageError(f"Topology {spec!r} gives {key!r} twice.", f"Keep one {key}=.")
        given.add(key)
        values[key] = known[key].parse(name, text)
    return family.build(ranks, **values)


def _usage(family: Family) -> str:
    if not family.parameters:
        return f"{family.name} alone, it takes no parameters"
    keys = ",".join(f"{p.name}={p.default if p.default is not None else 2}" for p in family.parameters)
    return f"{family.name} or {family.name}:{keys}"


def _log2(n: int) -> int:
    """ceil(log2 n), in integers; 0 for n = 1."""
    return (n - 1).bit_length()


def _shifts(n: int, distances: Iterable[int]) -> Step:
    """Every rank sends to rank + d for each distance d, and all shares, its own included, are equal."""
    peers = sorted({d % n for d in distances} - {0})
    return [(i, (i + d) % n, 1 / (len(peers) + 1)) for i in range(n) for d in peers]


def _pairs(pairs: Iterable[tuple[int, int]]) -> Step:
    """Disjoint pairs; the two of a pair end with their mean."""
    return [edge for i, j in pairs for edge in ((i, j, 0.5), (j, i, 0.5))]


def _metropolis(neighbours: list[set[int]]) -> list[Step]:
    """Metropolis-Hastings weights on an undirected graph: P[i, j] = 1 / (1 + max(deg i, deg j))."""
    return [
        [
            (i, j, 1 / (1 + max(len(near), len(neighbours[j]))))
            for i, near in enumerate(neighbours)
            for j in sorted(near)
        ]
    ]


def _cliques(groups: Iterable[list[int]]) -> Step:
    """Every group averages exactly: all send to all of the group, with weight 1 / size."""
    return [(i, j, 1 / len(group)) for group in groups for i in group for j in group if i != j]


@_family("exponential", "one peer a step, at distance 1, 2, 4, ...; the exact average in a cycle for n = 2^p")
def exponential(n: int) -> list[Step]:
    """P_k: i -> (i + 2^(k mod L)) mod n with weight 1/2, L = ceil(log2 n) steps (SGP, Assran et al. 2019)."""
    return [_shifts(n, [1 << k]) for k in range(_log2(n))] or [[]]


@_family("exponential-static", "all distances 1, 2, 4, ... at every step, equal weights")
def exponential_static(n: int) -> list[Step]:
    """P: i -> (i + 2^j) mod n for every j < L, with weight 1/(L + 1) (Assran et al. 2019)."""
    return [_shifts(n, [1 << k for k in range(_log2(n))])]


@_family("exponential-two-peer", "two peers a step, at distances 1 and 2, 4 and 8, ...")
def exponential_two_peer(n: int) -> list[Step]:
    """P_k: i -> i + 2^(2k mod L) and i + 2^((2k+1) mod L), weights 1/3 (Assran et al. 2019, "2P-SGP").

    The L distances are dealt two by two and the deal goes on around the end, so that an odd L makes L steps
    (1 2, 4 1, 2 4) and no step has a peer fewer; L = 1 (n = 2) has one distance and weight 1/2.
    """
    length = _log2(n)
    steps = length if length % 2 else length // 2
    return [_shifts(n, [1 << (2 * k + j) % length for j in (0, 1)]) for k in range(steps)] or [[]]


@_family("ring", "one peer, the next rank, at every step")
def ring(n: int) -> list[Step]:
    """P: i -> (i + 1) mod n with weight 1/2."""
    return [_shifts(n, [1])]


@_family("ring-bidirectional", "both neighbours at every step")
def ring_bidirectional(n: int) -> list[Step]:
    """P: i -> (i - 1) mod n and (i + 1) mod n with weight 1/3 (1/2 for n = 2); symmetric."""
    return [_shifts(n, [1, -1])]


@_family(
    "bipartite-exponential",
    "even ranks pair with odd ranks, at distance 1, 3, 5, 9, ...",
    admits="an even number of ranks, or 1",
)
def bipartite_exponential(n: int) -> list[Step]:
    """P_k: even i <-> (i + d) mod n with weight 1/2, d = 1, then 1 + 2^k while that is below n; symmetric."""
    if n > 1 and n % 2:
        raise UsageError(
            f"bipartite-exponential pairs even with odd ranks, which leaves one over of {n} ranks.",
            f"Use an even number of ranks, or base or matching, which take {n} ranks.",
        )
    distances = [1] + [1 + (1 << k) for k in range(1, _log2(n)) if 1 + (1 << k) < n]
    return [_pairs((i, (i + d) % n) for i in range(0, n, 2)) for d in distances] if n > 1 else [[]]


@_family(
    "hypercube",
    "pairs along one dimension a step; the exact average in a cycle",
    admits="a power of two of ranks",
)
def hypercube(n: int) -> list[Step]:
    """P_k: i <-> i xor 2^k with weight 1/2, log2 n steps; symmetric, the product of a cycle is J/n."""
    if n & (n - 1):
        raise UsageError(
            f"A hypercube needs a power of two of ranks, and {n} is none ({1 << n.bit_length() - 1} and "
            f"{1 << n.bit_length()} are).",
            f"Use base, which averages exactly for {n} ranks too.",
        )
    return [_pairs((i, i | 1 << k) for i in range(n) if not i >> k & 1) for k in range(_log2(n))] or [[]]


ROWS = Parameter("rows", int, None, "rows of the grid, a divisor of the ranks; by default the most square", 1)


@_family("grid", "a rectangle of ranks, each with its up to four neighbours", ROWS)
def grid(n: int, rows: int | None = None) -> list[Step]:
    """rows x columns ranks, row by row, Metropolis-Hastings weights; a path for prime n; symmetric."""
    return _metropolis(_lattice(n, rows, "grid", wrap=False))


@_family("torus", "a grid whose edges are joined: four neighbours for every rank", ROWS)
def torus(n: int, rows: int | None = None) -> list[Step]:
    """The grid with its opposite sides joined, Metropolis weights; a cycle for prime n; symmetric."""
    return _metropolis(_lattice(n, rows, "torus", wrap=True))


def _lattice(n: int, rows: int | None, name: str, wrap: bool) -> list[set[int]]:
    if rows is None:
        rows = max(d for d in _divisors(n) if d * d <= n)
    elif n % rows:
        raise UsageError(
            f"Topology {name!r}: rows={rows} does not divide {n} ranks.",
            f"Type {name}:rows= one of {', '.join(map(str, _divisors(n)))}, or leave it out.",
        )
    columns = n // rows
    # A set, because on a side of two the neighbour on the left and on the right are the same rank.
    neighbours: list[set[int]] = [set() for _ in range(n)]
    for i in range(n):
        row, column = divmod(i, columns)
        for r, c in ((row, column + 1), (row + 1, column)):
            if wrap or (r < rows and c < columns):
                j = r % rows * columns + c % columns
                if j != i:
                    neighbours[i].add(j)
                    neighbours[j].add(i)
    return neighbours


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@_family("star", "everyone with rank 0, at every step")
def star(n: int) -> list[Step]:
    """P: 0 <-> i with the Metropolis-Hastings weight 1/n; symmetric."""
    return _metropolis([set(range(1, n))] + [{0} for _ in range(1, n)])


@_family("complete", "everyone with everyone: the exact average at every step")
def complete(n: int) -> list[Step]:
    """P = J/n."""
    return [_cliques([list(range(n))])]


@_family("matching", "random pairs, from a seeded table of 4 ceil(log2 n) steps; odd n leaves one idle", SEED)
def matching(n: int, seed: int = 0) -> list[Step]:
    """P_k: random disjoint pairs with weight 1/2, symmetric (gossip in pairs, Boyd et al. 2006).

    The table has 4 ceil(log2 n) steps. A table whose union is not connected (only likely for n < 5) is
    thrown away and the same generator deals again, so that every seed gives a usable graph.
    """
    rng = random.Random(seed)
    while True:
        steps = []
        reached = {0}
        order = list(range(n))
        for _ in range(4 * _log2(n)):
            rng.shuffle(order)
            steps.append(_pairs(sorted((order[i], order[i + 1]) for i in range(0, n - 1, 2))))
        for _ in range(n):
            grown = reached | {j for step in steps for i, j, _ in step if i in reached}
            if grown == reached:
                break
            reached = grown
        if len(reached) == n:
            return steps or [[]]


@_family(
    "hierarchical",
    "the exact average inside each node, then one peer between the nodes, in turns",
    Parameter(
        "node",
        int,
        None,
        "ranks per node, a divisor of the ranks; by default the largest <= 8 of several nodes",
        1,
    ),
)
def hierarchical(n: int, node: int | None = None) -> list[Step]:
    """Steps in turns: J/node inside each node; then (g, l) -> (g + 2^k mod G, l) with weight 1/2.

    Rank r is local rank l = r mod node of node g = r div node, of G = n/node nodes, as launchers place ranks
    by default. One node makes `complete`, nodes of one rank make `exponential`.
    """
    if node is None:
        node = max((d for d in _divisors(n) if d <= 8 and d < n), default=1)
    if n % node:
        raise UsageError(
            f"Topology 'hierarchical': node={node} does not divide {n} ranks.",
            f"Type hierarchical:node= one of {', '.join(map(str, _divisors(n)))}.",
        )
    inside = _cliques([list(range(g, g + node)) for g in range(0, n, node)])
    between = [_shifts(n, [node << k]) for k in range(_log2(n // node))]
    if node == 1 or not between:
        return between or [inside]
    return [step for k in between for step in (inside, k)]


@_family(
    "base",
    "the exact average in a cycle for ANY n, with at most k peers a step",
    Parameter("k", int, 1, "the most peers a rank has in a step", 1),
)
def base(n: int, k: int = 1) -> list[Step]:
    """The base-(k+1) graph: at most 2 log_(k+1)(n) + 2 steps whose product is J/n (Takezawa et al. 2023).

    Every step is symmetric. The shorter is taken of the simple graph on all n, and, for n = p q with p the
    largest divisor of n whose primes are all <= k + 1, of the simple graph on p groups of q ranks at once,
    then the hyper-hypercube across the groups. q = 1 is the hyper-hypercube alone.
    """
    p, q = 1, n
    for prime in range(2, min(k + 1, n) + 1):
        while q % prime == 0:
            p, q = p * prime, q // prime
    groups = [list(range(g * q, (g + 1) * q)) for g in range(p)]
    within = [_simple_base(group, k) for group in groups]
    across = [_hyper_hypercube(list(ranks), k) for ranks in zip(*groups, strict=True)]
    split = list(_parallel(within)) + list(_parallel(across))
    whole = _simple_base(list(range(n)), k)
    return min(split, whole, key=len) or [[]]


def _parallel(graphs: list[list[Step]]) -> Iterator[Step]:
    """Graphs on disjoint ranks, step by step at once; the shorter ones idle at the end."""
    for step in range(max(map(len, graphs), default=0)):
        yield [edge for graph in graphs if step < len(graph) for edge in graph[step]]


@cache
def _factors(n: int, most: int) -> tuple[int, ...] | None:
    """The fewest factors of n with none above `most`; None when a prime of n is too large."""
    if n == 1:
        return ()
    found = [
        (d, *rest) for d in range(2, min(n, most) + 1) if n % d == 0 and (rest := _factors(n // d, most)) is not None
    ]
    return min(found, key=len, default=None)


def _hyper_hypercube(ranks: list[int], k: int) -> list[Step]:
    """Exact average of `ranks` with k peers a step: a mixed-radix hypercube, a digit a step, weight 1/radix.

    The number of ranks must be a product of factors <= k + 1.
    """
    factors = _factors(len(ranks), k + 1)
    assert factors is not None, "the caller chooses a size that factors"
    steps = []
    stride = 1
    for radix in factors:
        starts = (i for i in range(len(ranks)) if i // stride % radix == 0)
        steps.append(_cliques([ranks[i + digit * stride] for digit in range(radix)] for i in starts))
        stride *= radix
    return steps


def _simple_base(ranks: list[int], k: int) -> list[Step]:
    """Exact average of any number of ranks with at most k peers a step (Takezawa et al. 2023, Alg. 2).

    Write n = sum_l a_l (k+1)^(p_l), p_1 > p_2 > ..., 1 <= a_l <= k; group V_l has a_l blocks of (k+1)^(p_l)
    ranks, and R_l = V_(l+1) u V_(l+2) u ... are the ranks after it.
      1. Every group averages, all at once. Now a group is constant.
      2. Exchange l: every rank of R_l meets one rank of each block of V_l, with weight
         c = |V_l| / (a_l (|V_l| + |R_l|)). With s = |V_l|/(|V_l|+|R_l|) the later ranks become
         (1-s) R + s V: their mean is the mean of V_l u R_l. A block gains |R_l| c (R - V) in sum, which is
         |R_l|/(|V_l|+|R_l|) (R - V) in mean: the same mean. The later groups stay constant, so that
         exchange l+1 may follow at once.
      3. From then on the blocks of V_l average inside themselves, p_l steps.
    p_l + l falls with l, so that V_1 ends last: p_1 + 1 + 1 + p_1 steps at most.
    """
    n = len(ranks)
    if _factors(n, k + 1) is not None:
        return _hyper_hypercube(ranks, k)
    groups: list[list[list[int]]] = []  # group, block, rank
    power = 1
    while power * (k + 1) <= n:
        power *= k + 1
    at = 0
    while at < n:
        a = (n - at) // power
        if a:
            groups.append([ranks[at + b * power : at + (b + 1) * power] for b in range(a)])
            at += a * power
        power //= k + 1
    steps = list(_parallel([_hyper_hypercube([i for block in group for i in block], k) for group in groups]))
    later: list[list[Step]] = []
    for exchange, group in enumerate(groups[:-1]):
        rest = [i for after in groups[exchange + 1 :] for block in after for i in block]
        size = sum(map(len, group))
        weight = size / (len(group) * (size + len(rest)))
        met = [(i, block[r], weight) for r, i in enumerate(rest) for block in group]
        swap = met + [(j, i, weight) for i, j, weight in met]
        idle: list[Step] = [[] for _ in range(exchange)]
        later.append([*idle, swap, *_parallel([_hyper_hypercube(block, k) for block in group])])
    return steps + list(_parallel(later))


@_family(
    "equidyn",
    "one peer a step at a random distance, from a seeded table; weight eta (n-1)/n",
    Parameter("eta", float, 0.5, "how far a step goes; 1 sends all but 1/n", 0, 1, low_open=True),
    SEED,
)
def equidyn(n: int, eta: float = 0.5, seed: int = 0) -> list[Step]:
    """OD-EquiDyn: P_k = (1 - eta) I + eta A_u, A_u: j -> (j + u) mod n with (n-1)/n (Song et al. 2022).

    A_u keeps 1/n. Each u is drawn uniformly from 1..n-1 by `random.Random(seed)`, for a table of
    4 ceil(log2 n) steps. A table whose distances share a divisor with n, which would leave ranks that never
    meet, is dealt again from the same generator. eta = 1/2 is the default because a step contracts the
    expected squared error by 1 - 2 eta (1 - eta) or better: at eta = 1 a step is almost a permutation.
    """
    if n == 1:
        return [[]]
    rng = random.Random(seed)
    while True:
        distances = [rng.randrange(1, n) for _ in range(4 * _log2(n))]
        if math.gcd(n, *distances) == 1:
            return [[(j, (j + u) % n, eta * (n - 1) / n) for j in range(n)] for u in distances]
