"""Text for bash: every value is quoted, so that none can break a script or add a command to it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Any

from ..errors import UsageError


class Raw(str):
    """Text that goes into a script as it is; Jinja knows it by its __html__, as it knows what a template has made."""

    def __html__(self) -> str:
        return self


def quote(value: Any) -> Raw:
    """One word of bash with this value, on one line, so that it can stand in a comment too.

    Raises: UsageError for a NUL, which no word can hold.
    """
    if hasattr(value, "__html__"):
        return Raw(value)
    text = str(value)
    if "\0" in text:
        raise UsageError(f"{text!r} holds a NUL, which no shell can pass on.", "Choose another name.")
    if all(c.isprintable() for c in text):
        return Raw(shlex.quote(text))
    # $'...' is bash's form with escapes; the bytes of a name that is no UTF-8 are kept.
    plain = (
        chr(b) if 32 <= b < 127 and chr(b) not in "'\\" else f"\\{b:03o}" for b in text.encode(errors="surrogateescape")
    )
    return Raw("$'" + "".join(plain) + "'")


def words(values: Iterable[object], before: str = "") -> Raw:
    """Words of bash with these values, each with the word `before` in front."""
    return Raw(" ".join(f"{before} {quote(value)}".strip() for value in values))


def expand(value: object) -> Raw:
    """As `quote`, but $NAME, ${NAME} and ~/ stand for what they do in the job; nothing else of the shell works.

    Raises: UsageError for characters that cannot be printed.
    """
    text = re.sub(r"^~(?=/|$)", "$HOME", line(value))
    special = re.sub(r"[\\\"`]|\$(?!\{[A-Za-z_]\w*\}|[A-Za-z_])", r"\\\g<0>", text, flags=re.ASCII)
    return Raw(f'"{special}"' if "$" in special else quote(text))


def directive(value: object) -> Raw:
    """A value in a #SBATCH or #PBS line, which schedulers read by rules of their own: only what none can misread.

    Raises: UsageError
    """
    text = str(value)
    if not re.fullmatch(r"[\w.,:=@%/+\[\]()*&|-]+", text, re.ASCII):
        raise UsageError(
            f"{text!r} cannot stand in a scheduler's directive.",
            "Use letters, digits and .,:=@%/+-_ without blanks; other options belong in `directives` of the site.",
        )
    return Raw(text)


def line(value: object) -> Raw:
    """A whole line of the site's own, as it is. Raises: UsageError where it is more than one."""
    text = str(value)
    if not all(c.isprintable() or c == "\t" for c in text):
        raise UsageError(f"{text!r} is not one line of plain text.", "Give each line as a string of its own.")
    return Raw(text)
