"""Numbers as people write them."""


def size(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def clock(time_s: float) -> str:
    """Seconds as M:SS."""
    return f"{int(time_s // 60)}:{int(time_s % 60):02d}"
