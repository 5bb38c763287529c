"""The outer step's arithmetic against a copy: how near it is to the memory's speed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..slowmo import outer_step
from .common import Bench
from .report import OK, Column, Report, report, spread

# 1: where z is x0 already, as from the second call on, u would vanish, and arithmetic on denormal numbers is slow.
BETA = 1.0
ALPHA, GAMMA = 1.0, 0.1
ABOUT = (
    "outer: lines 7 and 8 of Algorithm 1 and the copy to z, float32, all ranks at once; copy: one copy_ of 3 N numbers",
    "GB/s (1e9 bytes): of 24 N bytes, the least to be moved (read xbar, x0, u; write x0, u, z)",
    "share: the copy's time over this",
)


def measure(bench: Bench, lengths: Sequence[int]) -> Report:
    """Two rows per length of the vector."""
    rows = []
    for n in lengths:
        bench.tell(f"outer step, {n} numbers")
        generator = torch.Generator().manual_seed(1)
        x0, u, z = (torch.randn(n, generator=generator).to(bench.comm.device) for _ in range(3))
        source, target = torch.ones(3 * n, device=z.device), torch.zeros(3 * n, device=z.device)
        outer, copy = partial(outer_step, x0, u, z, GAMMA, ALPHA, BETA), partial(target.copy_, source)

        u_after = BETA * u.double() + (x0.double() - z.double()) / GAMMA
        x0_after = x0.double() - ALPHA * GAMMA * u_after
        outer()
        copy()
        pairs = ((u, u_after), (x0, x0_after), (z, x0_after))
        right = all(torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-4) for got, wanted in pairs)
        ok = {"outer": bench.all(right), "copy": bench.all(torch.equal(source, target))}
        taken = bench.alternate({"outer": bench.repeatedly(outer), "copy": bench.repeatedly(copy)})
        for name, t in taken.items():
            rows.append({
                "numbers": n, "what": name, **t.spread(), "bandwidth_byte_s": 24 * n / t.median(),
                "share_of_copy": taken["copy"].median() / t.median(), "ok": ok[name],
            })  # fmt: skip
    columns = [
        Column("numbers", "numbers", "d"), Column("what", "what"), *spread("us", 1e6),
        Column("bandwidth_byte_s", "GB/s", ".2f", 1e-9), Column("share_of_copy", "share", ".3f"), OK,
    ]  # fmt: skip
    return report(bench, "outer", ABOUT, columns, rows)
