"""The checkpoints of a run: a folder of which the newest whole file is where the run goes on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import saved
from .checkpoint.read import step_of
from .checkpoint.store import Store, newest
from .checkpoint.write import leftovers, remove
from .errors import UsageError
from .worker import SlowMo


class Checkpoints:
    """Files step-00001234.h5 in a folder; made and used on all ranks together.

    keep: the newest so many stay; keep_every: and those of steps that are multiples of it (0: none). Who goes back to
    an older one with `load` gives up the later ones: the next save deletes them.
    layout: "parallel" (one file), "shards" (one per rank, and one that shows them as one), "auto".
    asynchronous: the state is copied, and written while training goes on; one at a time, so that a disk slower
    than the period holds the training up instead of filling the memory. `store.chosen` says what was chosen.
    config: text that is kept in each file.
    """

    def __init__(
        self,
        worker: SlowMo,
        folder: str | Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        layout: str = "auto",
        asynchronous: bool = True,
        config: str = "",
    ):
        self.worker, self.folder = worker, Path(folder)
        self.keep, self.keep_every, self.config = keep, keep_every, config
        self.gave_up_later = False  # what stands in the folder behind the step that is saved is of another life
        if keep < 1:
            raise UsageError(f"keep = {keep} would keep nothing.", "Give 1 or more.")
        self.store = Store(worker.comm, layout, asynchronous)
        if worker.comm.rank == 0:
            for rubbish in leftovers(self.folder):
                with contextlib.suppress(OSError):
                    shutil.rmtree(rubbish) if rubbish.is_dir() else rubbish.unlink()
        worker.comm.barrier()

    def save(self, extra: Mapping[str, Any] | None = None) -> Path:
        """Write the state as it is now, after the one before is on the disk. Raises: SlowmoError, on all ranks.

        extra: as in `SlowMo.save`. Asynchronous: what goes wrong is raised by the next `save`, `poll` or `wait`.
        """
        path = self.folder / f"step-{self.worker.state.step:08}.h5"
        attributes, tables = saved.describe(self.worker, self.store.layout, self.config)
        self.store.save(path, saved.pack_all(self.worker, extra), attributes, tables, lambda: self._prune(path))
        return path

    def load(self, place: str | Path | None = None, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
        """Go on from the newest whole checkpoint of this folder, or from `place` (a file or folder); its `extra`.

        note: told on rank 0 of damaged ones that are passed over. Raises: SlowmoError, on all ranks.
        """
        with newest(Path(place or self.folder), self.worker.comm, note) as checkpoint:
            extra = saved.load(self.worker, checkpoint)
        self.gave_up_later = True
        return extra

    def poll(self) -> bool:
        """Whether nothing is being written. Raises what went wrong since the last call."""
        return self.store.poll()

    def wait(self) -> None:
        """Until everything is on the disk. Raises what went wrong."""
        self.store.wait()

    def _prune(self, written: Path) -> None:
        """Delete what need not be kept, and later steps of a future that was given up, or that were damaged."""
        ours = sorted((p for p in self.folder.glob("step-*.h5") if step_of(p) >= 0), key=step_of)
        now = ours.index(written)
        old = [p for p in ours[: max(0, now + 1 - self.keep)] if not self._stays(step_of(p))]
        for path in old + (ours[now + 1 :] if self.gave_up_later else []):
            with contextlib.suppress(OSError):
                remove(path)

    def _stays(self, step: int) -> bool:
        return bool(self.keep_every) and step % self.keep_every == 0
