"""What all benchmarks share: what is typed, and timing in alternation on all ranks."""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import FAILED, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from ..comm import Communicator

LEAST_S = 5e-3  # of a repetition: shorter calls are repeated in it, or leaving the barrier would count
LEAST_WIRE_S = 1e-5
MOST_CALLS = 2_000
LEAST_REPETITIONS = 3

Sample = dict[str, float]
"""One repetition on one rank: "s", its seconds per call, and perhaps the seconds of its parts."""


# ---- what is typed ----
def parse_sizes(text: str, multiple: int = 4) -> tuple[int, ...]:
    """ "4,64Ki,16Mi" -> (4, 65536, 16777216). Raises: UsageError unless all are multiples of `multiple`, not 0."""
    sizes = []
    for word in text.split(","):
        found = re.fullmatch(r"(\d+)(|ki|mi|gi)", word.strip().lower())
        size = int(found[1]) << {"": 0, "ki": 10, "mi": 20, "gi": 30}[found[2]] if found else 0
        if size <= 0 or size % multiple:
            raise UsageError(
                f"{word.strip()!r} is no size: sizes are whole numbers above 0"
                + (f" and multiples of {multiple}, the bytes of a float32." if multiple > 1 else "."),
                "Type for example 4,64Ki,16Mi.",
            )
        sizes.append(size)
    return tuple(sizes)


def parse_rate(text: str | None) -> float:
    """ "1gbit", "2.5gbit" or bits per second -> bits per second; None: the network laboratory's; 0 where unknown."""
    word = text or os.environ.get("SLOWMO_NETLAB_RATE_BIT_S", "0")
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)(?:([kmg]?)bit)?", word.strip().lower())
    rate = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2] or ""] if found else -1.0
    if rate < 0 or (text and not rate):
        raise UsageError(f"{word!r} is no rate of a wire.", "Type 1gbit, 10gbit, or a number of bits per second.")
    return rate


def parse_names(text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """ "ring,mpi" -> ("ring", "mpi"). Raises: UsageError for a name that is not known."""
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            raise UsageError(f"There is no {what} {name!r}.{near}", f"It is one of: {', '.join(known)}.")
    return names


def bits(tensors: Iterable[Tensor]) -> int:
    """A number that tells the bits of these tensors from others."""
    code = 0
    for x in tensors:
        code = zlib.crc32(x.detach().cpu().contiguous().numpy().data, code)
    return code


# ---- timing ----
@dataclass
class Timing:
    """All repetitions of one variant. Of "s" a repetition's value is the slowest rank's, of parts the ranks' mean."""

    samples: list[Sample] = field(default_factory=list)

    def median(self, part: str = "s") -> float:
        return statistics.median(sample[part] for sample in self.samples)

    def spread(self) -> Sample:
        """Median and quartiles in seconds, as they stand in every row."""
        times = [sample["s"] for sample in self.samples]
        q1, median, q3 = statistics.quantiles(times, method="inclusive") if len(times) > 1 else times * 3
        return {"time_s": median, "q1_s": q1, "q3_s": q3, "repetitions": len(times)}


@dataclass
class Bench:
    """The ranks, and how long to measure: up to `repeat` repetitions, at least 3, no new one after `seconds`.

    rate_bit_s: of every host's wire, 0 where it is not known.
    """

    comm: Communicator
    rate_bit_s: float = 0.0
    repeat: int = 11
    seconds: float = 5.0
    threads: int = 1

    @cached_property
    def host_of(self) -> list[str]:
        """Every rank's host. Collective, the first time."""
        return self.comm.gather(self.comm.host)

    @property
    def hosts(self) -> int:
        return len(set(self.host_of))

    def over_wire(self, time_s: float, wire_bytes: float) -> float | None:
        """The time over what the wire alone would take for so many bytes.

        None where there is no wire, or where so few bytes travel that latency is all there is to measure.
        """
        limit_s = 8 * wire_bytes / self.rate_bit_s if self.rate_bit_s else 0.0
        return time_s / limit_s if limit_s > LEAST_WIRE_S else None

    def tell(self, text: str) -> None:
        """A line on stderr, from rank 0."""
        if self.comm.rank == 0:
            print(f"bench: {text}", file=sys.stderr, flush=True)

    def all(self, mine: bool) -> bool:
        """Whether it is so on every rank."""
        return all(self.comm.gather(bool(mine)))

    def same(self, mine: object) -> bool:
        """Whether it is the same on every rank."""
        return len(set(self.comm.gather(mine))) == 1

    def now(self) -> float:
        """Seconds, once all that was given to the device is done."""
        if self.comm.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.comm.device)
        return time.perf_counter()

    def alternate(self, variants: Mapping[str, Callable[[], Sample]]) -> dict[str, Timing]:
        """Measure A B A B ...: in each repetition every variant once, after a barrier."""
        taken = {name: Timing() for name in variants}
        spent_s, done = 0.0, 0
        while done < self.repeat and (done < LEAST_REPETITIONS or spent_s < self.seconds):
            for name, measure in variants.items():
                self.comm.barrier()
                start = time.perf_counter()
                sample = measure()
                everybody = self.comm.gather((sample, time.perf_counter() - start))
                merged = {key: statistics.fmean(s[key] for s, _ in everybody) for key in sample}
                taken[name].samples.append(merged | {"s": max(s["s"] for s, _ in everybody)})
                spent_s += max(elapsed for _, elapsed in everybody)
            done += 1
        return taken

    def repeatedly(self, call: Callable[[], object], count: int = 1) -> Callable[[], Sample]:
        """Seconds of a call, which does `count` equal things, called as often as a clock needs. Warms it up.

        Collective: all ranks call equally often.
        """
        for _ in range(2):  # the first is a cold one
            once_s = max(self.comm.gather(self._time(call, 1)))
            if once_s > LEAST_S:
                break
        calls = min(math.ceil(LEAST_S / once_s), MOST_CALLS)
        return lambda: {"s": self._time(call, calls) / count}

    def _time(self, call: Callable[[], object], calls: int) -> float:
        with self._bounded():
            start = self.now()
            for _ in range(calls):
                call()
            return (self.now() - start) / calls

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """The library's own blocking calls wait for ever: past the communicator's timeout the job is ended."""
        timer = threading.Timer(self.comm.timeout, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        comm = self.comm
        text = f"slowmo: Rank {comm.rank} on {comm.host} was in one measurement for {comm.timeout:.0f} s."
        print(f"{text}\n        A rank is stuck or dead; type `slowmo doctor`.", file=sys.stderr, flush=True)
        comm.abort(FAILED)
