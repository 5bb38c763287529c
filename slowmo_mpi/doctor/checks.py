"""What a check is, and how the ranks run one together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..comm import Endpoint
from ..comm.placement import count, fold

OK, WARNING, FAULT = "ok", "warning", "fault"
ORDER = (FAULT, WARNING, OK)
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """What a check found: ok | warning | fault, in a line, with more lines below it and as data for programs."""

    result: str
    found: str
    more: Sequence[str] = ()
    data: Any = None


@dataclass(frozen=True)
class Check:
    """A check's name and what it found."""

    name: str
    finding: Finding

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        finding = self.finding
        return {
            "name": self.name, "result": finding.result, "found": finding.found, "more": list(finding.more),
            "data": finding.data,
        }  # fmt: skip


def conclude(found: str, faults: Sequence[str] = (), warnings: Sequence[str] = (), more: Sequence[str] = (),
             data: Any = None) -> Finding:  # fmt: skip
    """The finding whose line is the worst that was found, or else `found`; the rest stands below."""
    told = [*faults, *warnings]
    result = FAULT if faults else WARNING if warnings else OK
    return Finding(result, told[0], [*told[1:], found, *more], data) if told else Finding(OK, found, more, data)


def together(comm: Endpoint, name: str, check: Callable[[Any], Finding]) -> Check:
    """Run a check on every rank; the same on all of them. Where ranks raise it is a fault, and they are named.

    Raises: SlowmoError where the ranks cannot even agree on what they found.
    """
    finding, error = None, ""
    try:
        finding = check(comm)
    except Exception as raised:
        error = " ".join(str(raised).split()) or type(raised).__name__
    everybody = comm.gather((comm.host, error))
    failed = [(rank, host, error) for rank, (host, error) in enumerate(everybody) if error]
    if failed:
        rank, host, error = failed[0]
        others = f" ({count(len(failed) - 1, 'other rank')} too)" if len(failed) > 1 else ""
        finding = Finding(FAULT, f"rank {rank} on {host}: {error}{others}")
    told = comm.gather(finding if comm.rank == 0 else None)[0]
    assert told is not None
    return Check(name, told)


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """What `work` gives, or what went wrong: so that a rank alone cannot leave the others waiting."""
    try:
        return work(), ""
    except Exception as error:
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def alike(values: dict[str, T]) -> list[tuple[T, list[str]]]:
    """host -> value as (value, its hosts), the most common first."""
    groups: dict[T, list[str]] = {}
    for host, value in values.items():
        groups.setdefault(value, []).append(host)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def differences(what: str, values: dict[str, str]) -> str:
    """ "torch is 2.13.0 on n[1-3] but 2.12.0 on n4", or "" where it is the same on all hosts."""
    groups = alike(values)
    parts = [f"{value} on {fold(hosts)}" for value, hosts in groups]
    return f"{what} is {' but '.join(parts)}" if len(groups) > 1 else ""
