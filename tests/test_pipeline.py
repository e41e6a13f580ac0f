"""The pipeline's recipe: which stages it goes through, and what it says of a run that is not at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psycho.errors import BadInput
from psycho.job import Job, Options, execute
from ray_jobs import pipeline as module

NAMES = [stage.__name__ for stage in module.STAGES]


def recorder(name: str, seen: list[tuple[str, tuple[str, ...]]]) -> Callable[[Job], None]:
    def stage(job: Job) -> None:
        seen.append((name, job.of))
        if name == "report" and "evaluate" not in job.of:
            raise BadInput("stage report needs stage evaluate")

    stage.__name__ = name
    return stage


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    found: list[tuple[str, tuple[str, ...]]] = []
    for name in NAMES:
        monkeypatch.setattr(module, name, recorder(name, found))
    monkeypatch.setattr(module, "STAGES", tuple(getattr(module, name) for name in NAMES))
    return found


@pytest.mark.parametrize(
    ("until", "extra", "names"),
    [
        (None, (), NAMES),
        ("report", (), NAMES),
        ("pair", (), NAMES[:4]),
        ("prepare", (), NAMES[:1]),
        ("pair", ("pairs.source=pairs.parquet",), ["prepare", "pair"]),
    ],
)
def test_the_stages_up_to_one_and_the_report(
    tmp_path: Path, capsys: Any, seen: Any, until: Any, extra: Any, names: Any
):
    options = Options(overrides=extra, run_dir=str(tmp_path / "run"), until=until)
    assert execute("pipeline", module.pipeline, options) == 0
    assert [name for name, _ in seen] == names + ([] if names == NAMES else ["report"])
    assert all(of == tuple(names) for _, of in seen)
    said = capsys.readouterr().err
    assert ("no report yet: stage report needs stage evaluate" in said) == (names != NAMES)
    assert (tmp_path / "run" / "summary.json").exists() and "Win rate" not in said
