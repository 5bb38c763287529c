"""The one exception that users see, and the exit codes of every command."""

import difflib
from collections.abc import Iterable

DONE = 0
FAILED = 1
USAGE = 2
FAULT_FOUND = 3
STOPPED_EARLY = 75
INTERRUPTED = 130


class SlowmoError(Exception):
    """A mistake or a fault, told in two sentences: what is true, and what to type.

    `message` says what is true, `hint` what to do about it. The command line prints both, without
    a traceback, and ends with `exit_code`.
    """

    exit_code = FAILED

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(SlowmoError):
    """The command line or the configuration is wrong; nothing was started."""

    exit_code = USAGE


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'ring'?" to put behind a sentence, or nothing where no known word is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.55)
    return f" Did you mean {near[0]!r}?" if near else ""
