"""What is watched over the rounds, when to stop, which policy to keep, and where the time goes."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from psycho.config import Config, OnlineConfig
from psycho.errors import BadInput, StageFailed
from psycho.training.online import proof, watch
from psycho.training.online.clock import Clock


def _samples(*scores: float | None, safety: int | None = None) -> list[dict[str, Any]]:
    """Two a speech."""
    return [
        {"speech_id": str(n // 2), "response": "x" * n, "score": score, "safety": safety, "output_tokens": n}
        | {"judge_tokens": 10 * n, "truncated": n == 1}
        for n, score in enumerate(scores)
    ]


def test_figures_by_hand() -> None:
    found = watch.figures(_samples(1.0, 3.0, None, 2.0), OnlineConfig())
    assert (found["samples"], found["failed"], found["floor_hits"]) == (4, 1, 0)
    assert found["mean_score"] == 2.0 and found["best_score"] == 2.5
    assert found["spread"] == pytest.approx(0.5)  # 1 and 0
    assert found["mean_chars"] == 1.5 and found["sampled_tokens"] == 6
    assert found["judge_tokens"] == 60 and found["truncated"] == 1


def test_a_policy_gains_nothing_by_falling_silent() -> None:
    """An answer that is empty counts as the worst; one that could not be scored does not count."""
    said = [{"response": "a", "value": 4.0}, {"response": "b", "value": 1.0}]
    assert watch.mean_value(said) == 2.5
    assert watch.mean_value([*said, {"response": "", "value": None}]) == 2.0
    assert watch.mean_value([*said, {"response": "c", "value": None}]) == 2.5
    assert watch.mean_value([{"response": "", "value": None}]) is None


def test_no_score_at_all_is_no_crash() -> None:
    found = watch.figures(_samples(None, None), OnlineConfig())
    assert (found["failed"], found["mean_score"], found["best_score"], found["spread"]) == (2, 0.0, 0.0, 0.0)


def test_floor_hits_are_counted() -> None:
    online = OnlineConfig(scorer="judge", safety_floor=3)
    assert watch.figures(_samples(1.0, 2.0, safety=2), online)["floor_hits"] == 2
    assert watch.figures(_samples(1.0, 2.0, safety=3), online)["floor_hits"] == 0


@pytest.mark.parametrize(
    ("dev", "trained", "kept"),
    [
        ({}, 3, 3),
        ({0: None, 1: None, 2: None}, 2, 2),
        ({0: 9.0, 1: 1.0, 2: 3.0, 3: 2.0}, 3, 2),  # the first policy is no result of the rounds
        ({0: 0.0, 1: 2.0, 2: 2.0}, 2, 1),
    ],
)
def test_the_policy_that_is_kept(dev: dict[int, float | None], trained: int, kept: int) -> None:
    assert watch.best(dev, trained) == kept


@pytest.mark.parametrize(
    ("dev", "patience", "stops"),
    [
        ({0: 1.0, 1: 2.0, 2: 1.5}, None, False),
        ({0: 1.0, 1: 2.0, 2: 1.5}, 2, False),
        ({0: 1.0, 1: 2.0, 2: 1.5}, 1, True),
        ({0: 3.0, 1: 2.0, 2: 1.5}, 2, True),
        ({0: 1.0, 1: 2.0, 2: 2.5}, 1, False),
        ({}, 1, False),
    ],
)
def test_patience(dev: dict[int, float | None], patience: int | None, stops: bool) -> None:
    assert watch.stops(dev, 2, patience) is stops


class _Reader:
    """Log-probabilities from a table, by model."""

    def __init__(self, **values: float) -> None:
        self.values = values

    def read(self, model: str, rows: list[list[int]]) -> list[list[float] | None]:
        return [None if len(row) > 40 else [self.values[model]] * (len(row) - 1) for row in rows]


def test_divergence_is_of_the_response_alone(nano_tokenizer: Any) -> None:
    texts = [
        ([{"role": "user", "content": "I am tired."}], "I hear you."),
        ([{"role": "user", "content": "No."}], "What?"),
    ]
    reader: Any = _Reader(now=-1.0, first=-1.5)
    found = watch.divergence(reader, nano_tokenizer, "now", "first", texts)
    lengths = [
        len(nano_tokenizer.apply_chat_template([*p, {"role": "assistant", "content": r}], tokenize=True)["input_ids"])
        - len(nano_tokenizer.apply_chat_template(p, tokenize=True, add_generation_prompt=True)["input_ids"])
        for p, r in texts
    ]
    assert found["entropy"] == 1.0
    assert found["kl"] == pytest.approx(0.5 * sum(lengths) / 2)
    assert watch.divergence(reader, nano_tokenizer, "now", "now", texts)["kl"] == 0.0


def test_a_text_that_no_engine_takes_is_left_out(nano_tokenizer: Any) -> None:
    reader: Any = _Reader(now=-1.0)
    texts = [([{"role": "user", "content": "I am tired. " * 30}], "I hear you.")]
    assert watch.divergence(reader, nano_tokenizer, "now", "now", texts) == {}


def _moved(texts: list[list[float]], size: float, seed: int) -> list[list[float]]:
    chance = random.Random(seed)
    return [[value + chance.gauss(0, size) for value in text] for text in texts]


@pytest.mark.parametrize("step", [0.3, 0.02, 0.002])
def test_an_engine_that_keeps_its_weights_is_caught_where_the_tolerance_hides_it(step: float) -> None:
    """The change of a round may be smaller than the rounding, which in each of them is another."""
    policy = [[-1.0] * 100, [-2.0] * 300]
    later = _moved(policy, step, 1)
    first, second = _moved(policy, 0.02, 2), _moved(policy, 0.02, 3)
    before = proof.Read(_moved(policy, 0.02, 4), [first, second])
    taken, now = [_moved(later, 0.02, seed) for seed in (5, 6)], _moved(later, 0.02, 7)
    proof.check(now, [taken[0], second], 2.0)
    proof.check_moved(before, proof.Read(now, taken))
    with pytest.raises(StageFailed, match=r"engine 1 did not take the new weights: .* moved by 0 and what"):
        proof.check_moved(before, proof.Read(now, [taken[0], second]))


def test_a_policy_that_stands_still_proves_nothing() -> None:
    read = proof.Read([[-1.0] * 100], [[[-1.0] * 100]])
    proof.check_moved(read, read)


def test_weights_that_cannot_be_proven_are_said(nano_tokenizer: Any) -> None:
    speeches = [{"speech_id": "s", "question": "I am tired. " * 40}]
    with pytest.raises(
        BadInput, match=r"fits into 16 tokens.*raise training.max_length.* over the \d+ that"
    ) as refused:
        proof.probes(speeches, None, nano_tokenizer, 2, 16)
    enough = int(re.findall(r"over the (\d+)", str(refused.value))[0]) + 1
    assert len(proof.probes(speeches, None, nano_tokenizer, 2, enough)) == 1
    assert proof.probes(speeches, None, nano_tokenizer, 0, 16) == []
    assert len(proof.probes(speeches, None, nano_tokenizer, 2, 512)) == 1


def test_the_proof_names_worker_text_and_tolerance() -> None:
    said = [[-1.0, -2.0], [-3.0]]
    assert proof.check(said, [[[-1.0, -2.0001], [-3.0]]], 1e-3) == pytest.approx(1e-4)
    other = [said, [[-1.0, -2.5], [-3.0]]]
    with pytest.raises(StageFailed, match=r"engine 1 .*probe 0 differs by 0.5 .*sync_tolerance 0.001.*so report it$"):
        proof.check(said, other, 1e-3)
    with pytest.raises(StageFailed, match=r"give the same command again.*if it stays so set online.transport=disk$"):
        proof.check(said, other, 1e-3, sent=True)
    with pytest.raises(StageFailed, match="differs by nan"):
        proof.check(said, [[[-1.0, float("nan")], [-3.0]]], 1e-3)
    with pytest.raises(StageFailed, match="another number of tokens"):
        proof.check(said, [[[-1.0], [-3.0]]], 1e-3)


def test_waiting_is_what_was_in_no_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("psycho.training.online.clock.time.perf_counter", lambda: now[0])
    clock = Clock()
    for phase, seconds in (("sampling", 2.0), ("training", 1.0), ("sampling", 3.0), ("waiting", 0.5)):
        with clock(phase):
            now[0] += seconds
    now[0] += 1.0
    assert clock.whole() == {"sampling": 5.0, "training": 1.0, "waiting": 1.5, "wall": 7.5}


# Settings


def test_a_safety_floor_needs_ratings() -> None:
    with pytest.raises(
        ValueError, match=r"online.safety_floor asks the reward model's heads.*or leave online.safety_floor out"
    ):
        Config.model_validate({"online": {"safety_floor": 3}})
    for scorer in ("judge", "mixture"):
        assert not Config.model_validate({"online": {"safety_floor": 3, "scorer": scorer}}).online.heads


def test_patience_needs_a_dev_share() -> None:
    with pytest.raises(ValueError, match=r"pairs.dev_share is 0"):
        Config.model_validate({"online": {"patience": 2}})
