"""A rebuild trains on until the gates are passed, begins anew where it does not get there, and gives up by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from psycho.config import NanoConfig, TrainingConfig
from psycho.errors import StageFailed
from psycho.judging.fitness import Gate
from psycho.nano import build
from psycho.nano.build import EXTENSIONS, RESTARTS, Rebuild
from psycho.nano.world import MODELS
from psycho.progress import Progress


class Stub(Rebuild):
    """Trains nothing and writes down what would be trained, as (model, start, output)."""

    def _train(self, wanted: list[tuple[str, str, str, int]], seed: int) -> None:
        self.trained += [(seed, *one[:3]) for one in wanted]
        for _, _, output, _ in wanted:
            (self.work / output).mkdir(parents=True)

    def _shipped(self, folder: str) -> Path:
        return self.work / folder

    def _publish(self, gates: list[Gate], seed: int) -> None:
        self.published = seed


@pytest.fixture
def rebuild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(build, "first_weights", lambda folder, seed, jitter: folder.mkdir(parents=True))

    def rebuild(copies: list[float], judged: list[dict[str, float]]) -> Any:
        """`copies`: the backbone's gate at each measure; `judged`: the gates missed at each measure of all models."""
        drills, rounds = iter(copies), iter(judged)
        made = Stub(
            target=tmp_path / "made", config=NanoConfig(seed=7), training=TrainingConfig(), progress=Progress(),
            drilled=lambda folder: Gate("backbone: copies", next(drills), 0.9, 10),
            measure=lambda folders: [Gate(name, value, 0.9, 10) for name, value in next(rounds).items()],
            say=lambda text: None,
        )  # fmt: skip
        made.trained = []
        return made

    return rebuild


def test_what_passes_at_once_is_trained_once(rebuild: Any) -> None:
    made = rebuild([0.95], [{"judge: clarity": 0.95}])
    assert all(gate.passed for gate in made.run())
    assert [output for *_, output in made.trained] == ["backbone-0", *(f"{name}-0" for name in MODELS)]
    assert made.published == 7


def test_a_model_that_misses_is_trained_on_and_only_that_one(rebuild: Any) -> None:
    made = rebuild([0.2, 0.95], [{"judge: clarity": 0.5, "warm: on grammar": 0.99}, {"judge: clarity": 0.95}])
    made.run()
    assert (7, "backbone", "backbone-0", "backbone-1") in made.trained
    assert made.trained[-1] == (7, "judge", "judge-0", "judge-1")
    assert sum(model == "warm" for _, model, *_ in made.trained) == 1


def test_a_backbone_that_never_copies_is_begun_again_from_other_weights(rebuild: Any) -> None:
    made = rebuild([0.1] * (1 + EXTENSIONS) + [0.95], [{"judge: clarity": 0.95}])
    made.run()
    assert made.published == 1007
    assert {seed for seed, *_ in made.trained} == {7, 1007}


def test_giving_up_on_the_backbone_names_its_gate(rebuild: Any) -> None:
    made = rebuild([0.1] * (1 + EXTENSIONS) * RESTARTS, [])
    with pytest.raises(StageFailed, match=r"given up after 3 tries: backbone: copies 0.10 \(must be 0.90\)"):
        made.run()


def test_giving_up_names_the_gate(rebuild: Any) -> None:
    tries = (1 + EXTENSIONS) * RESTARTS
    made = rebuild([0.95] * RESTARTS, [{"judge: relevance": 0.13}] * tries)
    with pytest.raises(StageFailed, match=r"judge: relevance 0.13 \(must be 0.90\)"):
        made.run()
