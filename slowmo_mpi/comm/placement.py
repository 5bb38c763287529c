"""Where the ranks of a job are: host, cores, GPU; and what is wrong with that. No torch and no MPI here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..errors import SlowmoError
from .launcher import Launch


@dataclass(frozen=True)
class Place:
    """Where one rank is.

    host: the node's name, the scheduler's where it gives one. leader: the first rank that MPI lets share memory with
    this one; ranks of one leader are on one host. local_rank, local_size: among these. claim: what the launcher says.
    cores: those it may run on, such as "0-3,8". gpu: the GPU's UUID, or "" on the CPU. gpus: how many it sees.
    """

    rank: int
    host: str
    leader: int
    local_rank: int
    local_size: int
    claim: Launch | None
    cores: str
    gpu: str = ""
    gpus: int = 0


def check_devices(places: Sequence[Place]) -> None:
    """Raises: SlowmoError where some ranks have a GPU and others none."""
    without = [p for p in places if not p.gpu]
    if without and len(without) < len(places):
        raise SlowmoError(
            f"{who(without)} see no GPU, and the other ranks see one.",
            "Look at CUDA_VISIBLE_DEVICES there and at the GPUs asked of the scheduler (--gpus-per-task=1, "
            "select=...:ngpus=...), or hide them from all: CUDA_VISIBLE_DEVICES= .",
        )


def warnings(places: Sequence[Place], host_cores: int) -> list[str]:
    """What makes a job slow without a word: ranks that share a GPU or are bound to the same core, and the like.

    host_cores: how many a host has; ranks that may use all of them are not bound.
    """
    return [*_shared_gpus(places), *_shared_cores(places, host_cores), *_strange_claims(places)]


def _shared_gpus(places: Sequence[Place]) -> list[str]:
    found = []
    for host in hosts(places):
        gpus = {p.gpu for p in host}
        if "" not in gpus and len(gpus) < len(host):
            seen = f" of {host[0].gpus}" if host[0].gpus > len(gpus) else ""
            found.append((f"{len(host)} ranks share {count(len(gpus), 'GPU')}{seen} on {{}}.", host[0].host))
    said = _on_hosts(found)
    for gpu in sorted({p.gpu for p in places} - {""}):
        here = [p for p in places if p.gpu == gpu]
        if len({p.leader for p in here}) > 1:
            said.append(f"{who(here)} have the same GPU, but share no memory: MPI takes them for ranks of other hosts.")
    return said


def _shared_cores(places: Sequence[Place], host_cores: int) -> list[str]:
    found = []
    for host in hosts(places):
        for cores in sorted({p.cores for p in host}):
            ranks, number = sum(p.cores == cores for p in host), len(numbers(cores))
            if number < ranks and number < host_cores:
                bound = f"{ranks} ranks are bound to core{'s' if number > 1 else ''} {cores}"
                hint = "see --bind-to, --cpus-per-task"
                found.append((f"{bound} of {{}}, and take turns there: {hint}.", host[0].host))
    return _on_hosts(found)


def _on_hosts(found: Sequence[tuple[str, str]]) -> list[str]:
    """Each sentence once, with the hosts that it is true of in place of {}."""
    return [text.format(fold(h for t, h in found if t == text)) for text in dict.fromkeys(t for t, _ in found)]


def _strange_claims(places: Sequence[Place]) -> list[str]:
    """Where MPI and the launcher see different ranks on a host. MPI's view counts: it chooses the GPU."""
    found = [
        (
            f"{p.claim.launcher} says that it started {count(p.claim.local_size, 'rank')} on {{}}, and MPI that "
            f"{p.local_size} share{'s' if p.local_size == 1 else ''} memory there: are they in containers of their "
            "own? GPUs are chosen by MPI's view.",
            p.host,
        )
        for p in places
        if p.claim is not None and p.claim.local_size not in (0, p.local_size)
    ]
    return _on_hosts(found)


def hosts(places: Sequence[Place]) -> list[list[Place]]:
    """The ranks of each host, in the order of their first ranks."""
    found: dict[int, list[Place]] = {}
    for place in places:
        found.setdefault(place.leader, []).append(place)
    return list(found.values())


def who(places: Sequence[Place]) -> str:
    """ "Rank 3 on n1", "Ranks 0-3 on n1", "Ranks 0-7 on n[1-2]"."""
    ranks = ranges(p.rank for p in places)
    return f"Rank{'s' if len(places) > 1 else ''} {ranks} on {fold(dict.fromkeys(p.host for p in places))}"


def count(number: int, thing: str) -> str:
    """ "1 rank", "4 ranks"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def ranges(values: Iterable[int]) -> str:
    """{0, 1, 2, 8} -> "0-2,8"."""
    runs = [[v for _, v in run] for _, run in groupby(enumerate(sorted(set(values))), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def numbers(text: str) -> list[int]:
    """The inverse of `ranges`."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",") if part]
    return [v for end in ends for v in range(end[0], end[-1] + 1)]


def fold(names: Iterable[str]) -> str:
    """n1, n2, n3, login -> "n[1-3], login", as Slurm writes it. Numbers with zeros in front keep their width."""
    groups: dict[tuple[str, int, str], list[int]] = {}
    alone: dict[tuple[str, int, str], str] = {}
    for name in names:
        found = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
        width = len(found[2]) if found and found[2].startswith("0") and len(found[2]) > 1 else 0
        key = (found[1], width, found[3]) if found else (name, 0, "")
        groups.setdefault(key, []).extend([int(found[2])] if found else [])
        alone.setdefault(key, name)
    words = []
    for key, values in groups.items():
        (head, width, tail), listed = key, ranges(values)
        if width:
            listed = re.sub(r"\d+", lambda digits: digits[0].zfill(width), listed)  # noqa: B023
        words.append(alone[key] if len(set(values)) < 2 else f"{head}[{listed}]{tail}")
    return ", ".join(words)
