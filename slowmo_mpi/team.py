"""Workers made of several ranks, as in the paper, where a worker is a node.

Inside a worker gradients are averaged in every step, so its ranks always have the same parameters. Between workers
each rank exchanges its 1/L of them with the rank that has the same place in the other worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .comm import Endpoint
from .errors import UsageError


@dataclass(frozen=True)
class Team:
    """inside: the ranks of this worker (None where it is one); across: those with this rank's place, by worker."""

    across: Endpoint
    inside: Endpoint | None = None

    @classmethod
    def of(cls, comm: Endpoint, ranks_per_worker: int) -> Team:
        """The teams of so many ranks each, neighbours on a host together. Collective.

        Raises: UsageError where the ranks cannot be shared out like that.
        """
        if ranks_per_worker == 1:
            return cls(comm)
        if ranks_per_worker < 1 or comm.size % ranks_per_worker:
            raise UsageError(
                f"{comm.size} ranks do not make workers of {ranks_per_worker} ranks.",
                f"Start a multiple of {max(1, ranks_per_worker)} ranks, or give another run.worker.",
            )
        hosts = comm.gather(comm.host)
        seen = list(dict.fromkeys(hosts))
        order = sorted(range(comm.size), key=lambda r: (seen.index(hosts[r]), r))
        workers = [order[i : i + ranks_per_worker] for i in range(0, comm.size, ranks_per_worker)]
        columns = [list(column) for column in zip(*workers, strict=True)]
        if any(list(members) != sorted(members) for members in workers + columns):
            raise UsageError(
                f"The ranks lie on the hosts in an order ({hosts}) that makes no workers of {ranks_per_worker} ranks.",
                "Have the launcher place them host by host, or in turn.",
            )
        mine = next(i for i, members in enumerate(workers) if comm.rank in members)
        place = workers[mine].index(comm.rank)
        return cls(across=comm.group(place), inside=comm.group(mine))

    @property
    def ranks(self) -> int:
        """How many ranks a worker has, L."""
        return self.inside.size if self.inside else 1

    def part(self, vector: Tensor) -> slice:
        """This rank's 1/L of a whole vector."""
        return self.inside.shard(vector.numel()) if self.inside else slice(0, vector.numel())

    def gather(self, vectors: list[Tensor]) -> None:
        """Put whole vectors together of the parts that the ranks of this worker have."""
        if self.inside:
            for vector in vectors:
                self.inside.all_gather_(vector, "gather inside the worker")


def ranks_of_a_node(comm: Endpoint) -> int:
    """How many ranks every host has. Collective. Raises: UsageError where the hosts differ."""
    sizes = set(comm.gather(comm.local_size))
    if len(sizes) > 1:
        raise UsageError(
            f"run.worker = node, but the hosts have different numbers of ranks: {sorted(sizes)}.",
            "Start as many ranks on every host.",
        )
    return sizes.pop()
