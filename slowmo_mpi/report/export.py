"""The runs' numbers for other programs: CSV, TensorBoard event files."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

from ..errors import SlowmoError
from .compare import Comparison
from .runs import Run


def csv_text(comparison: Comparison) -> str:
    """A line for every record of every run: run, the settings in which runs differ, then the record as it is."""
    keys = [*comparison.keys, *(["run.seed"] if len(comparison.runs) > 1 else [])]
    names = dict.fromkeys(["kind", "step", "epoch", "time_s"])
    names |= dict.fromkeys(name for run in comparison.runs for record in run.records for name in record)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *keys, *names])
    for run in comparison.runs:
        mine = [run.name, *(run.settings.get(k) for k in keys)]
        writer.writerows([*mine, *(record.get(name) for name in names)] for record in run.records)
    return text.getvalue()


def tensorboard(comparison: Comparison, folder: Path) -> None:
    """Event files of the runs in folders of their names, with the tags that run.tensorboard = true writes.

    Raises: SlowmoError where the package is not installed or the folder cannot be written.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        raise SlowmoError(
            "TensorBoard files need the package tensorboard, which is not installed.", "Type `pip install tensorboard`."
        ) from None
    for run in comparison.runs:
        start_s, place = _started_s(run), folder / run.name.strip("/.").replace("/", "-")
        try:
            for old in place.glob("events.out.tfevents.*"):
                old.unlink()  # TensorBoard would show both
            writer = EventFileWriter(str(place))
        except OSError as error:
            raise SlowmoError(f"{place} cannot be written: {error.strerror}.", "Give another FOLDER.") from None
        for record in run.records:
            values = [
                Summary.Value(tag=f"{record['kind']}/{name}", simple_value=value)
                for name, value in record.items()
                if name != "step" and isinstance(value, int | float)
            ]
            at_s = start_s + (record.get("time_s") or 0.0)
            writer.add_event(Event(wall_time=at_s, step=record["step"], summary=Summary(value=values)))
        writer.close()


def _started_s(run: Run) -> float:
    """When the training began, as time.time() has it; its lives follow each other without gaps."""
    lives = run.manifest.get("lives")
    first = lives[0] if isinstance(lives, list) and lives and isinstance(lives[0], dict) else run.manifest
    try:
        return time.mktime(time.strptime(str(first.get("started"))[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0
