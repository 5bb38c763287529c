"""benchmarks/studies.py: its cases are configurations, its runs run, its shares differ in their classes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from slowmo_mpi import config
from slowmo_mpi.tasks import Context
from slowmo_mpi.tasks.classification import Images

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture(scope="module")
def studies() -> Iterator[ModuleType]:
    sys.path.insert(0, BENCHMARKS)
    import studies

    yield studies
    sys.path.remove(BENCHMARKS)


def test_every_case_is_a_configuration_and_none_is_there_twice(studies: ModuleType) -> None:
    for study in studies.STUDIES.values():
        keys = [case.key(0) for case in study.cases]
        assert len(keys) == len(set(keys))
        for case in study.cases:
            config.parse(case.text, "a case", [f"{k}={json.dumps(v)}" for k, v in case.settings.items()])


def test_a_case_is_run_and_shown(studies: ModuleType, tmp_path: Path) -> None:
    study = studies.STUDIES["theory"]
    cases = [c for c in study.cases if c.x == study.cases[0].x and c.ranks < 16]
    short = [dataclasses.replace(c, settings={**c.settings, "run.steps": 24, "run.log_every": 24}) for c in cases]
    runs = {case.key(0): studies.run(case, 0) for case in short}
    assert all(run["gradient"] > 0 for run in runs.values())
    points = [dataclasses.replace(case, x=x) for case in short for x in (24, 48, 96)]
    table = studies.rates(dataclasses.replace(study, cases=points), runs, 1, tmp_path / "theory.png")
    assert table.count("| m = ") == len(short) and (tmp_path / "theory.png").stat().st_size > 10_000


def test_interval_is_students(studies: ModuleType) -> None:
    mean, spread = studies.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and spread == pytest.approx(4.303 / 3**0.5)
    assert studies.told([0.5, 0.5], 100.0) == "50.00 ± 0.00"


def test_shares_differ_in_their_classes_and_together_are_all(studies: ModuleType) -> None:
    from study_tasks import Shared, split

    labels = torch.arange(4000).remainder(10).to(torch.uint8)
    shares = split(labels.numpy().tobytes(), 4, 0.1, 7)
    assert sorted(torch.cat([torch.from_numpy(s) for s in shares]).tolist()) == list(range(4000))
    counts = [Counter(labels[share].tolist()) for share in shares]
    assert all(sum(c.values()) == 1000 for c in counts)
    assert any(largest > 250 for c in counts for _, largest in c.most_common(1))  # an even split has 100 of each

    images = Images(torch.zeros(4000, 2, 2, dtype=torch.uint8), labels, 0.0, 1.0)
    _, drawn = Shared(images, Context(2, 4, 7, ""), 0.1).batch(torch.tensor([0, 999, 1000, 3999]))
    assert drawn.tolist() == labels[shares[2][[0, 999, 0, 999]]].tolist()
