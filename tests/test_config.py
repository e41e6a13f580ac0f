"""The configuration: strict about keys, types and values, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from psycho.config import DEFAULT_CONFIG, Config, build_config, known_keys, load_config, to_yaml
from psycho.errors import BadInput

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
PROMISED = (  # docs/DESIGN.md: settings that other tools set by name
    "speeches.source",
    "speeches.text_column",
    "generation.models_per_speech",
    "generation.pool",
    "judge.model",
    "pairs.min_gap",
    "training.zero_stage",
    "training.workers",
    "training.dpo.beta",
    "online.rounds",
    "evaluation.baseline",
    "seed",
)


GOLD: dict[str, Any] = {"online": {"gold_every": 2}, "pairs": {"dev_share": 0.1}}


def sentence(tree: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as caught:
        build_config(tree, "some.yaml")
    message = str(caught.value)
    assert message.startswith("some.yaml: ") and "\n" not in message
    return message


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text("seed: 3\npairs: {min_gap: 0.5}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("key", PROMISED)
def test_settings_that_other_tools_set_by_name_are_there(key):
    assert key in set(known_keys())
    value_at(Config(), key)


@pytest.mark.parametrize(
    ("tree", "unknown", "nearest"),
    [
        ({"sed": 1}, "sed", "seed"),
        ({"training": {"dpo": {"bata": 0.2}}}, "training.dpo.bata", "training.dpo.beta"),
        ({"pairs": {"mingap": 1}}, "pairs.mingap", "pairs.min_gap"),
        ({"speeches": {"text_colum": "a"}}, "speeches.text_colum", "speeches.text_column"),
        ({"judge": {"engine": {"dtyp": "auto"}}}, "judge.engine.dtyp", "judge.engine.dtype"),
        ({"evaluation": {"judge": {"modl": "x"}}}, "evaluation.judge.modl", "evaluation.judge.model"),
        (
            {"generation": {"models_per_speech": 1, "pool": [{"name": "a", "model": "b", "param_b": 1}]}},
            "generation.pool.0.param_b",
            "generation.pool.parameters_b",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tree, unknown, nearest):
    assert sentence(tree) == f"some.yaml: unknown key {unknown}; did you mean {nearest}?"


def test_an_unknown_key_like_no_other_lists_what_is_known_there():
    message = sentence({"pairs": {"qqqqqq": 1}})
    assert "unknown key pairs.qqqqqq" in message and "min_gap" in message


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"seed": "many"}, ("seed", "integer", "'many'")),
        ({"seed": 1.5}, ("seed", "integer", "1.5")),
        ({"pairs": {"min_gap": "wide"}}, ("pairs.min_gap", "number", "'wide'")),
        ({"name": 7}, ("name", "string", "7")),
        ({"speeches": None}, ("speeches", "None")),
        ({"speeches": "file.csv"}, ("speeches", "'file.csv'")),
        ({"generation": {"pool": "all"}}, ("generation.pool", "'all'")),
        ({"generation": {"pool": [{"model": "b"}]}}, ("generation.pool.0.name", "is missing")),
        ({"training": {"zero_stage": 4}}, ("training.zero_stage", "0, 1, 2 or 3", "4")),
        ({"judge": {"template": "long"}}, ("judge.template", "'rubric' or 'compact'", "'long'")),
        ({1: 2}, ("1", "string")),
    ],
)
def test_a_wrong_type_is_named_with_key_and_value(tree, parts):
    message = sentence(tree)
    assert all(part in message for part in parts), message


def pool(count: int) -> list[dict[str, str]]:
    return [{"name": f"m{i}", "model": f"owner/m{i}"} for i in range(count)]


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"generation": {"models_per_speech": 4, "pool": pool(3)}}, ("models_per_speech is 4", "3 models")),
        ({"generation": {"models_per_speech": 1, "pool": pool(1) * 2}}, ("share a name",)),
        ({"pairs": {"min_gap": -0.1}}, ("pairs.min_gap", "greater than or equal to 0", "-0.1")),
        ({"pairs": {"min_gap": 4.5}}, ("pairs.min_gap", "4.5")),
        ({"speeches": {"min_chars": 900, "max_chars": 10}}, ("max_chars 10", "min_chars 900")),
        ({"training": {"dpo": {"beta": 0}}}, ("training.dpo.beta", "greater than 0")),
        ({"training": {"sft": {"lr": float("inf")}}}, ("training.sft.lr", "finite")),
        ({"judge": {"fluency_floor": float("nan")}}, ("judge.fluency_floor", "finite")),
        ({"serving": {"port": 70000}}, ("serving.port", "65535")),
        ({"evaluation": {"judge": {"retries": -1}}}, ("evaluation.judge.retries", "-1")),
        ({"training": {"keep": "best"}}, ("training.keep best", "pairs.dev_share is 0; set it to 0.1")),
        ({"online": {"scorer": "judge", "min_gap": 4.1}}, ("online: min_gap 4.1 is over 4", "lower it")),
        ({"evaluation": {"judge": {"mode": "panel", "panel": [{"model": "a"}, {"model": "b"}]}}}, ("compares alone",)),
        ({"training": {"dpo": {"loss": "ipo", "label_smoothing": 0.1}}}, ("label_smoothing", "not of ipo")),
        ({"online": {"loss": "simpo", "f_divergence": "js"}}, ("f_divergence", "loss simpo has none")),
        (
            {"inference": {"engine": {"extra": {"tensor_parallel_size": 2}}}},
            ("extra.tensor_parallel_size is a setting of its own",),
        ),
        (GOLD | {"speeches": {"source": "a.csv"}, "policy": "o/p"}, ("name its model in evaluation.judge.model",)),
        (
            GOLD | {"pairs": {"source": "a.csv", "dev_share": 0.1}, "policy": "o/p"},
            ("online.gold_every needs a judge",),
        ),
    ],
)
def test_impossible_values(tree, parts):
    message = sentence(tree)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "tree",
    [
        {"training": {"keep": "best"}, "pairs": {"dev_share": 0.1}},
        {"online": {"scorer": "judge", "min_gap": 4}},
        {"online": {"scorer": "judge", "min_gap": 9, "length_penalty": 0.5}},  # which widens gaps
        {"online": {"scorer": "mixture", "min_gap": 9}},
        GOLD,
        GOLD | {"pairs": {"source": "a.csv", "dev_share": 0.1}, "policy": "nano:base"},  # may be of the nano world
        GOLD | {"speeches": {"source": "a.csv"}, "policy": "o/p", "evaluation": {"judge": {"model": "o/j"}}},
    ],
)
def test_near_to_impossible(tree):
    build_config(tree, "x")


def test_strategy_all_has_no_limit_of_its_own():
    def limit(**online):
        config = build_config({"online": online}, "x")
        assert build_config(yaml.safe_load(to_yaml(config)), "x") == config
        return config.online.max_pairs_per_speech

    assert limit(strategy="all") is None and limit(strategy="all", max_pairs_per_speech=1) == 1
    assert limit() == 1 and limit(strategy="top_margin") == 1


def test_as_many_models_as_the_pool_holds_is_possible():
    assert (
        build_config({"generation": {"models_per_speech": 3, "pool": pool(3)}}, "x").generation.models_per_speech == 3
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.dpo.beta=0.2", "training.dpo.beta", 0.2),
        ("training.dpo.lr=5e-7", "training.dpo.lr", 5e-7),
        (" seed =11", "seed", 11),
        ("pairs.min_gap=1", "pairs.min_gap", 1.0),
        ("evaluation.baseline=a/b", "evaluation.baseline", "a/b"),
        ("generation.system_prompt=a = b", "generation.system_prompt", "a = b"),
        ("judge.fluency_floor=null", "judge.fluency_floor", None),
        ("judge.fluency_floor=-8.75", "judge.fluency_floor", -8.75),
        ("inference.env={A: '1'}", "inference.env", {"A": "1"}),
        ("inference.env.A=null", "inference.env", {"A": None}),
    ],
)
def test_overrides(file, override, key, value):
    assert value_at(load_config(file, [override]), key) == value


def test_overrides_of_lists_of_an_empty_section_and_the_last_one_wins(file):
    file.write_text("pairs: {min_gap: 0.5}\ngeneration:\nevaluation:\n", encoding="utf-8")
    override = "generation={models_per_speech: 1, pool: [{name: a, model: o/a}, {name: b, model: o/b}]}"
    config = load_config(file, [override, "evaluation.baseline=a/b", "seed=1", "seed=2"], run_dir="elsewhere")
    assert [model.name for model in config.generation.pool] == ["a", "b"]
    assert (config.seed, config.run_dir, config.pairs.min_gap) == (2, "elsewhere", 0.5)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "is not key=value"),
        ("=3", "is not key=value"),
        ("seed.more=3", "seed is a value, not a section"),
        ("seed=", "--set seed: seed: input should be a valid integer"),
        ("pairs={min_gap: 1, min_gap: 2}", "--set pairs: the value has the key min_gap twice, in line 1"),
        ("name=[", "--set name: the value is not valid YAML"),
        ("name=2001-99-99", "--set name: the value is not valid YAML"),
        ("training.dpo.bata=1", "did you mean training.dpo.beta?"),
        ("a..b=1", "unknown key a"),
    ],
)
def test_bad_overrides(file, override, part):
    with pytest.raises(BadInput) as caught:
        load_config(file, [override])
    assert part in str(caught.value)


def test_an_entry_of_a_list_can_be_set():
    nano = Path(__file__).parents[1] / "configs" / "nano.yaml"
    before = load_config(nano).generation.pool
    overrides = [
        "generation.pool.1.model=o/m",
        "generation.pool.0.engine.dtype=float16",
        "generation.pool.4={name: z, model: o/z}",
    ]
    pool = load_config(nano, overrides).generation.pool
    assert (pool[1].name, pool[1].model) == (before[1].name, "o/m")
    assert pool[0].engine is not None and pool[0].engine.dtype == "float16"
    assert (pool[4].name, pool[2], pool[3]) == ("z", before[2], before[3])


@pytest.mark.parametrize("override", [f"generation.pool.{place}=a" for place in ("5.model", "first.model", "-1")])
def test_an_entry_that_is_not_there(override):
    with pytest.raises(BadInput, match=r"generation.pool is a list and has no entry .*; its entries are 0 to 4"):
        load_config(Path(__file__).parents[1] / "configs" / "nano.yaml", [override])


@pytest.mark.parametrize(
    ("overrides", "origin"),
    [
        (["pairs.min_gap=9"], "--set pairs.min_gap: pairs.min_gap: "),
        (["seed=1", "speeches.max_chars=50", "name=a"], "--set speeches.max_chars: speeches: "),
        (["training.sequence_parallel=2", "training.workers=3"], "--set training.workers: training: "),
        (["pairs.min_gap=9", "pairs.min_gap=9.5"], "--set pairs.min_gap: "),
        (["training.keep=best", "seed=2"], "--set training.keep: configuration: "),
    ],
)
def test_an_error_in_a_set_names_the_set(file, overrides, origin):
    with pytest.raises(BadInput) as caught:
        load_config(file, overrides)
    assert str(caught.value).startswith(origin)


def test_an_error_of_the_file_names_the_file_whatever_is_set(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("seed: 3\npairs: {min_gap: 9}\n")
    with pytest.raises(BadInput, match=f"^{path}: pairs.min_gap"):
        load_config(path, ["seed=1"])


def test_a_key_of_a_merged_section_may_be_set_again(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("judge: &one\n  model: o/j\n  retries: 1\nevaluation:\n  judge:\n    <<: *one\n    retries: 2\n")
    config = load_config(path)
    assert config.judge.retries == 1 and config.evaluation.judge is not None and config.evaluation.judge.retries == 2


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"seed: 1\npairs: [\n", "is not valid YAML at line 3"),
        (b"seed: 1\nname: a: b\n", "is not valid YAML at line 2"),
        (b"seed: 1\nname: 2001-99-99\n", "is not valid YAML"),
        (b"seed: \x00\n", "is not valid YAML"),
        (b"", "holds no settings"),
        (b"- seed\n", "holds no settings"),
        (b"seed: 1\npairs:\n  min_gap: 1\n  min_gap: 2\n", "has the key min_gap twice, in lines 3 and 4"),
        (b"seed: 1\nname: a\nseed: 2\n", "has the key seed twice, in lines 1 and 3; keep one of them"),
        (b"pairs: {min_gap: 1, min_gap: 2}\n", "has the key min_gap twice, in line 1"),
        (b"name: \xff\xfe\n", "check it is UTF-8"),
    ],
)
def test_yaml_errors(tmp_path, content, part):
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        load_config(path)
    assert part in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="cannot be read: IsADirectoryError"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["nano", "nano.yaml", "configs/nano.yaml"])
def test_a_shipped_configuration_is_found_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(DEFAULT_CONFIG)
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("seed: 3\n")
    assert load_config(name).seed == 3, "a file of one's own comes first"


def test_a_configuration_that_is_nowhere_is_told_which_there_are():
    for name in ("none", "configs/none.yaml", "elsewhere/nano.yaml"):
        with pytest.raises(BadInput, match=r"does not exist; psycho brings nano, paper-3b, paper-8b, .*--config nano$"):
            load_config(name)


def test_frozen():
    config = Config()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.training.dpo.beta = 1.0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_round_trips(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(copy) == config
    assert list(yaml.safe_load(to_yaml(config))) == list(Config.model_fields)


# YAML's line breaks beyond \n are left out: PyYAML folds them, and no setting holds them.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]) | st.sampled_from("\n\t"))


@settings(deadline=None)
@given(
    name=TEXT,
    seed=st.integers(),
    gap=st.floats(0, 4),
    lr=st.floats(0, 1, exclude_min=True),
    prompt=st.none() | TEXT,
)
def test_round_trip_of_any_text_and_number(name, seed, gap, lr, prompt):
    tree = {
        "name": name,
        "seed": seed,
        "pairs": {"min_gap": gap},
        "training": {"dpo": {"lr": lr}},
        "generation": {"system_prompt": prompt},
    }
    config = build_config(tree, "x")
    assert build_config(yaml.safe_load(to_yaml(config)), "x") == config


def test_defaults_are_the_papers():
    config = Config()
    assert (config.speeches.min_chars, config.speeches.max_chars) == (100, 1000)
    assert (config.generation.models_per_speech, config.pairs.min_gap) == (4, 1.0)
    reward, online = config.training.reward, config.online
    assert (reward.lr, reward.epochs, reward.batch_size, config.training.max_length) == (9e-6, 2, 128, 2048)
    assert (online.lr, online.batch_size, online.speeches_per_round, online.samples_per_speech) == (5e-7, 64, 6400, 8)
    assert config.training.dpo.beta == 0.1
