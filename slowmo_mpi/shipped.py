"""Where the files are that come with the package beside its code."""

from __future__ import annotations

import sys
from pathlib import Path


def folder(name: str) -> Path:
    """NAME/ of a checkout, or share/slowmo-mpi/NAME when installed."""
    checkout = Path(__file__).resolve().parent.parent / name
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "slowmo-mpi" / name
