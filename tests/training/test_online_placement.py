"""Where engines and training lie, what that needs, and what cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from psycho.config import Config, load_config
from psycho.errors import BadInput
from psycho.stages import check_config
from psycho.training.online.placement import check_placement, engine_of, transport_of

COLOCATED = {"placement": "colocate", "scorer_gpus_per_worker": 0.1}


def _config(online: Any = None, training: Any = None, inference: Any = None) -> Config:
    """One GPU for both."""
    return Config.model_validate(
        {
            "online": online if online is not None else COLOCATED,
            "training": {"workers": 1, "gpus_per_worker": 0.3} | (training or {}),
            "inference": {"workers": 1, "gpus_per_worker": 0.6} | (inference or {}),
        }
    )


@pytest.mark.parametrize(
    ("online", "device", "way"),
    [
        ({}, "cuda", "disk"),  # parts of a GPU, which may be the same one
        ({}, "cpu", "disk"),
        (COLOCATED, "cuda", "ipc"),
        (COLOCATED | {"transport": "disk"}, "cuda", "disk"),
        ({"transport": "disk"}, "cuda", "disk"),
    ],
)
def test_the_way_fits_the_placement(online: Any, device: str, way: str) -> None:
    config = _config(online, {"device": device})
    assert transport_of(config) == way
    check_placement(config)


def test_weights_in_four_bits_go_by_the_folder() -> None:
    lora = {"workers": 1, "gpus_per_worker": 1, "lora": {"quantize": "nf4"}}
    whole = {"gpus_per_worker": 1}
    assert transport_of(_config({}, lora, whole)) == "disk"
    assert transport_of(_config({}, lora | {"lora": {}}, whole)) == "nccl"
    with pytest.raises(BadInput, match=r"quantize keeps them in 4 bits; set online.transport=disk"):
        check_placement(_config({"transport": "nccl"}, lora, whole))


def test_engines_on_the_cpu_read_the_folder() -> None:
    assert transport_of(_config({}, {"gpus_per_worker": 1}, {"gpus_per_worker": 0})) == "disk"


def test_whole_gpus_talk_over_nccl() -> None:
    config = Config.model_validate({"online": {"transport": "auto"}})
    assert transport_of(config) == "nccl"
    check_placement(config)
    assert engine_of(config, config.inference.engine, True).extra == {"weight_transfer_config": {"backend": "nccl"}}


@pytest.mark.parametrize(
    ("online", "training", "inference", "sentence"),
    [
        ({}, {"device": "cpu"}, {}, r"training.device is cpu; set online.placement=separate"),
        ({"staleness": 1}, {}, {}, r"engines sleep then; set online.staleness=0"),
        ({"transport": "nccl"}, {}, {}, r"set online.transport to ipc or disk"),
        ({"placement": "separate", "transport": "ipc"}, {}, {}, r"online.placement is separate; set"),
        ({"placement": "separate", "transport": "nccl"}, {"device": "cpu"}, {}, r"set online.transport=disk"),
        ({"placement": "separate", "transport": "nccl"}, {}, {"gpus_per_worker": 0}, r"set online.transport=disk"),
        ({"placement": "separate", "transport": "nccl"}, {}, {}, r"0.3 and .* 0.6 may be parts of the same one"),
        ({}, {}, {"engine": {"tensor_parallel_size": 2}}, r"tensor_parallel_size is 2; set it to 1"),
        ({}, {}, {"workers": 2}, r"inference.workers 2 is not training.workers 1"),
        ({}, {"gpus_per_worker": 0.5}, {}, r"0.6, training.gpus_per_worker 0.5 .*\(0.1\) are over 1 together"),
        (
            {},
            {"workers": 2},
            {"workers": 2, "gpus_per_worker": 0.45},
            r"put on one GPU; set inference.gpus_per_worker=0.6, ",
        ),
        (
            {},
            {"workers": 2, "gpus_per_worker": 0.2},
            {"workers": 2},
            r"workers of .* 0.2 could be put on one GPU",
        ),
        ({"scorer": "judge", "scorer_workers": 1}, {}, {}, r"that score \(0.6\) are over 1 together"),
        ({"scorer": "mixture", "scorer_workers": 2}, {}, {}, r"that score \(1.4\) are over 1 together"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    online: Any, training: Any, inference: Any, sentence: str
) -> None:
    config = _config(COLOCATED | online, training, inference)
    for check in (check_placement, check_config):
        with pytest.raises(BadInput, match=sentence):
            check(config)


JUDGES: tuple[dict[str, Any] | None, ...] = (
    None,
    {"model": "a"},
    {"model": "a", "gpus_per_worker": 0.5},
    {"model": "a", "gpus_per_worker": 4},
    {"model": "a", "engine": {}},
)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("share", [0.2, 0.45, 1.0])
@pytest.mark.parametrize("scorer_workers", [None, 1, 4])
@pytest.mark.parametrize("scorer", ["reward", "judge", "mixture"])
def test_who_follows_the_advice_on_shares_is_not_refused_again(
    scorer: str, scorer_workers: int | None, share: float, workers: int
) -> None:
    for judge in JUDGES[1:]:
        for held_out in JUDGES:
            tree: dict[str, Any] = {
                "online": {"placement": "colocate", "scorer": scorer, "scorer_workers": scorer_workers},
                "training": {"workers": workers, "gpus_per_worker": share},
                "inference": {"workers": workers, "gpus_per_worker": share},
                "judge": judge,
                "evaluation": {"judge": held_out and held_out | {"model": "b"}},
                "pairs": {"dev_share": 0.1},
            }
            tree["online"]["gold_every"] = 2 if held_out else None
            tree = json.loads(json.dumps(tree))  # sections of its own
            _follow(tree)


def _follow(tree: dict[str, Any]) -> None:
    try:
        check_placement(Config.model_validate(tree))
        return
    except BadInput as refused:
        advised = re.findall(r"([\w.]+)=([\d.]+)", str(refused))
    assert advised
    for key, number in advised:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = float(number) if "." in number else int(number)
    check_placement(Config.model_validate(tree))


def test_the_papers_run_can_be_colocated_by_the_advice() -> None:
    shares = ["training.gpus_per_worker=0.3", "inference.gpus_per_worker=0.6", "online.scorer_gpus_per_worker=0.1"]
    settings = ["online.placement=colocate", "training.workers=4", *shares]
    paper = Path(__file__).parents[2] / "configs" / "paper-8b.yaml"
    with pytest.raises(
        BadInput, match=r"that score \(0.4\) are over 1 together; set .*online.scorer_workers=1"
    ) as refused:
        check_placement(load_config(paper, settings))
    check_placement(load_config(paper, [*settings, *re.findall(r"[\w.]+=[\d.]+", str(refused.value))]))


def test_engines_get_what_their_placement_needs() -> None:
    config = _config()
    engine = config.inference.engine
    assert engine_of(config, engine, True).extra == {
        "enable_sleep_mode": True,
        "weight_transfer_config": {"backend": "ipc"},
    }
    assert engine_of(config, engine, False).extra == {"enable_sleep_mode": True}
    assert engine_of(_config({}, {"device": "cpu"}), engine, True) is engine
    own = engine.model_copy(update={"extra": {"enable_sleep_mode": False, "swap_space": 1}})
    assert engine_of(config, own, False).extra == {"enable_sleep_mode": False, "swap_space": 1}
