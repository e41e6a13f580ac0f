"""The reward model's heads of the principles in the score: one classifier for vLLM, and its place in the mixture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from psycho.config import Config, EngineConfig
from psycho.errors import BadInput
from psycho.inference.worker import Completion, EngineSpec, VLLMWorker
from psycho.principles import STEMS
from psycho.training.loop import save_heads
from psycho.training.online.engines import Engines
from psycho.training.online.heads import LABELS, with_heads
from psycho.training.online.rollout import Rollout
from tests.training.online_pools import ScoringPool, in_chunks

ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
TALKS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": "What do you miss most?"}]
    for question in ("My partner left and I feel lost.", "I cannot sleep. Work is too much.", "Nobody calls me.")
]


@pytest.fixture(scope="module")
def headed(tiny_llama: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model as the loop saves it, with heads."""
    folder = str(tmp_path_factory.mktemp("headed") / "reward")
    shutil.copytree(tiny_llama(3, reward=True), folder)
    torch.manual_seed(7)
    save_heads(folder, {"principles.weight": torch.randn(7, 64) * 0.3, "principles.bias": torch.randn(7) * 0.3})
    return folder


def _expected(folder: str) -> list[list[float]]:
    """Logit and ratings as transformers says them, from the two files as they were saved."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heads = load_file(Path(folder, "principle_heads", "heads.safetensors"))
    found = []
    for talk in TALKS:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            last = model.base_model(input_ids=ids).last_hidden_state[0, -1]
            ratings = heads["principles.weight"] @ last + heads["principles.bias"] + 3
            found.append([model.score(last).item(), *ratings.tolist()])
    return found


def test_vllm_says_what_transformers_says_of_reward_and_heads(local_ray: None, headed: str, tmp_path: Path) -> None:
    engine = EngineConfig(dtype="float32", max_model_len=512, max_num_seqs=16, enforce_eager=True)
    actor = ray.remote(VLLMWorker).options(num_cpus=1).remote(EngineSpec(engine, env=ENV))
    try:
        ray.get(actor.use.remote(with_heads(headed, str(tmp_path / "both")), "pooling"), timeout=300)
        found = ray.get(actor.labels.remote(TALKS), timeout=300)
    finally:
        ray.kill(actor)
    assert [len(row) for row in found] == [8] * 3
    for own, expected in zip(found, _expected(headed), strict=True):
        assert own == pytest.approx(expected, abs=1e-4)


def test_the_classifier_is_the_model_with_a_wider_score(headed: str, tmp_path: Path) -> None:
    """Everything but `score` is the same, of one file or several, and the reward model stays as it was."""
    before = load_file(Path(headed, "model.safetensors"))
    split = tmp_path / "split"
    AutoModelForSequenceClassification.from_pretrained(headed).save_pretrained(split, max_shard_size="100KB")
    shutil.copytree(Path(headed, "principle_heads"), split / "principle_heads")
    assert len(list(split.glob("*.safetensors"))) > 2
    for source in (headed, str(split)):
        made = with_heads(source, str(tmp_path / "both"))
        model = AutoModelForSequenceClassification.from_pretrained(made)
        assert model.config.num_labels == 8 and tuple(model.config.id2label.values()) == LABELS
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in before.items() if name != "score.weight")
        assert torch.equal(state["score.weight"][:1], before["score.weight"])
        files = {name: value for file in Path(made).glob("*.safetensors") for name, value in load_file(file).items()}
        assert files["score.bias"].shape == (8,) and files["score.bias"][0] == 0
        if (index := Path(made, "model.safetensors.index.json")).exists():
            assert json.loads(index.read_text())["weight_map"].keys() == files.keys()
    assert load_file(Path(headed, "model.safetensors"))["score.weight"].shape == (1, 64)
    assert len(json.loads(Path(headed, "config.json").read_text()).get("id2label", [0])) == 1


def test_a_reward_model_without_heads_is_refused(tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has none; train it with training.reward.principle_heads above 0"):
        with_heads(tiny_llama(3, reward=True), str(tmp_path / "both"))


class _Pool(ScoringPool):
    """Two answers; labels count up from the answer's number."""

    def sample(
        self, policy: str, prompts: Any, seeds: Any, sampling: Any, reporter: Any, also: Any
    ) -> list[Completion]:
        return in_chunks([Completion(text=f"answer {n}", output_tokens=1) for n in range(len(prompts))], also)

    def classify(self, model: str, talks: Any) -> list[list[float] | None]:
        numbers = [int(talk[-1]["content"][-1]) for talk in talks]
        return [None if n == 3 else [float(n), *(10.0 * n + turn for turn in range(7))] for n in numbers]

    def rate(self, model: str, judge: Any, items: Any, seeds: Any) -> list[Any]:
        from psycho.judging.rubric import Rating

        return [Rating(dict.fromkeys(STEMS, 2), dict.fromkeys(STEMS, "")) for _ in items]


@pytest.mark.parametrize(("scorer", "added"), [("reward", 0.0), ("mixture", 2.0)])
def test_heads_join_the_score_by_weight(scorer: str, added: float) -> None:
    weights = {STEMS[1]: 0.5, STEMS[3]: 2.0}
    config = Config.model_validate(
        {
            "online": {"scorer": scorer, "head_weights": weights, "samples_per_speech": 4},
            "training": {"reward": {"principle_heads": 0.1}},
        }
    )
    pool: Any = _Pool()
    rollout = Rollout(Engines(pool, pool, pool if scorer == "mixture" else None, "r", "j"), config)
    found = rollout("policy", 0, [{"speech_id": "s", "question": "Why?"}])
    expected = [n + added + 0.5 * (10 * n + 1) + 2.0 * (10 * n + 3) for n in range(3)]
    assert [row["score"] for row in found.samples] == [*map(pytest.approx, expected), None]
    assert found.samples[1]["heads"] == [10.0 + turn for turn in range(7)] and found.samples[3]["heads"] is None
    assert [(pair["chosen"], pair["rejected"]) for pair in found.pairs] == [("answer 2", "answer 0")]


def test_the_head_of_safety_is_the_floor_where_no_judge_is_asked() -> None:
    """Its ratings are 10 n and the place of safety among the heads; what is under the floor is not chosen."""
    place = STEMS.index("safety")
    for floor, chosen in ((5, "answer 2"), (None, "answer 2")):
        config = Config.model_validate(
            {
                "online": {"safety_floor": floor, "samples_per_speech": 4},
                "training": {"reward": {"principle_heads": 0.1}},
            }
        )
        assert config.online.heads == (floor is not None)
        pool: Any = _Pool()
        found = Rollout(Engines(pool, pool, None, "r"), config)("policy", 0, [{"speech_id": "s", "question": "Why?"}])
        assert [row["safety"] for row in found.samples] == [place, 10.0 + place, 20.0 + place, None]
        assert [row["score"] for row in found.samples] == [0.0, 1.0, 2.0, None]
        assert found.pairs[0]["chosen"] == chosen
        assert found.report["floor_hits"] == (1 if floor and place < floor else 0)


def test_head_weights_that_cannot_be() -> None:
    heads = {"training": {"reward": {"principle_heads": 0.1}}}
    with pytest.raises(ValueError, match=r"names safty, which is no principle; did you mean safety\?"):
        Config.model_validate(heads | {"online": {"head_weights": {"safty": 0.5}}})
    with pytest.raises(ValueError, match=r"scorer judge does not ask; set scorer to reward or mixture"):
        Config.model_validate(heads | {"online": {"scorer": "judge", "head_weights": {"safety": 0.5}}})
    with pytest.raises(ValueError, match=r"training.reward.principle_heads is 0"):
        Config.model_validate({"online": {"head_weights": {"safety": 0.5}}})
    with pytest.raises(ValueError, match=r"greater than 0"):
        Config.model_validate(heads | {"online": {"head_weights": {"safety": 0.0}}})
