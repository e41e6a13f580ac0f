"""What can be set: every key with its kind, default and description, and what a file sets otherwise."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from psycho.config import Config, build_config, known_keys
from psycho.config.inference import RemoteConfig
from psycho.errors import BadInput
from psycho.settings import changed, find
from ray_jobs.cli import JOBS, app

SETTINGS = {setting.key: setting for setting in find()}


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["settings", *arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_every_setting_is_there_in_the_order_of_the_configuration():
    assert [setting.key for setting in find()] == list(known_keys())
    _, shown = run("--all")
    assert all(f"\n{key}: " in f"\n{shown}" for key in known_keys())


def test_a_section_is_what_lies_below_it_and_no_more():
    keys = [setting.key for setting in find("online.sampling")]
    assert keys[0] == "online.sampling" and keys[1:] == [k for k in SETTINGS if k.startswith("online.sampling.")]
    assert [setting.key for setting in find("pairs.min_gap")] == ["pairs.min_gap"]
    assert {"judge", "judge.model"} <= {setting.key for setting in find("judge")} <= {k for k in SETTINGS if "jud" in k}


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("seed", "whole number", "0"),
        ("policy", "text", "''"),
        ("online.lr", "number, above 0", "5e-07"),
        ("online.batch_size", "whole number, at least 1", "64"),
        ("online.patience", "whole number, at least 1, or none", "none"),
        ("online.scorer_engine", "section or none", "none"),
        ("online.scorer", "reward, judge or mixture", "reward"),
        ("online.staleness", "0 or 1", "0"),
        ("online.head_weights", "by name: number, above 0", "{}"),
        ("inference.env", "by name: text", "{}"),
        ("inference.gpus_per_worker", "number, at least 0", "1"),
        ("speeches.mask_personal_data", "true or false", "true"),
        ("speeches.languages", "list of text", '["en"]'),
        ("speeches.topic_model", "text or none", "none"),
        ("training", "section", ""),
        ("generation.pool", "list of sections", "[]"),
        ("generation.pool.name", "text; must be set", ""),
    ],
)
def test_kinds_in_plain_words_and_defaults(key, kind, default):
    assert (SETTINGS[key].kind, SETTINGS[key].default) == (kind, default)


def test_descriptions_are_those_of_the_fields_and_of_the_sections_classes():
    assert SETTINGS["generation.pool.remote.tries"].doc == RemoteConfig.model_fields["tries"].description
    assert SETTINGS["serving"].doc == "The Ray Serve application."
    _, shown = run("online.staleness")
    assert shown.splitlines()[1].strip() == "1: the next round is sampled while this one trains"


def test_every_setting_says_what_it_is_for():
    assert [setting.key for setting in find() if not setting.doc] == []


def test_a_file_is_compared_with_the_defaults(tmp_path):
    assert changed(Config()) == {}
    judge = {"model": "o/j", "temperature": 0.0, "engine": {"dtype": "float16"}}
    tree = {"seed": 3, "online": {"rounds": 16, "lr": 1e-6}, "evaluation": {"judge": judge}, "pairs": {"min_gap": 2.0}}
    tree["generation"] = {"models_per_speech": 1, "pool": [{"name": "a", "model": "b"}]}
    assert changed(build_config(tree, "test")) == {
        "seed": "3",
        "generation.models_per_speech": "1",
        "generation.pool": "a list of 1",
        "pairs.min_gap": "2",
        "online.lr": "1e-06",
        "evaluation.judge": "set",
        "evaluation.judge.model": "o/j",
        "evaluation.judge.engine": "set",
        "evaluation.judge.engine.dtype": "float16",
    }
    file = tmp_path / "mine.yaml"
    file.write_text("online: {rounds: 2}\n", encoding="utf-8")
    code, shown = run("online", "--config", str(file))
    assert code == 0 and [line for line in shown.splitlines() if "; here" in line] == [
        "online.rounds: whole number, at least 1; default 16; here 2"
    ]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("onlin", "online"), ("online.samplin", "online.sampling"), ("training.dpo.bata", "training.dpo.beta")],
)
def test_an_unknown_section_is_one_sentence_with_the_nearest(key, nearest):
    with pytest.raises(BadInput, match="there is no setting"):
        find(key)
    code, shown = run(key)
    assert (code, shown) == (2, f"error: there is no setting {key}; did you mean {nearest}?\n")


def test_a_file_that_is_wrong_is_one_sentence_too(tmp_path):
    code, shown = run("--config", str(tmp_path / "none.yaml"))
    assert code == 2 and shown.startswith("error: configuration ") and shown.count("\n") == 1


@pytest.mark.parametrize("job", [*JOBS, "export"])
def test_the_help_of_a_job_says_where_the_settings_are(job):
    shown = CliRunner().invoke(app, [job, "--help"], env={"COLUMNS": "200"}).output
    assert "`psycho settings` lists the keys" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("word", "first", "among"),
    [
        ("beta", {"training.dpo.beta", "online.beta"}, {"online.beta"}),
        ("Temperature", {"judge.temperature"}, {"online.sampling.temperature"}),
        (
            "gpu",
            {"generation.pool.engine.gpu_memory_utilization"},
            {"training.gpus_per_worker", "inference.gpus_per_worker"},
        ),
        ("spot", set(), {"training.max_failures"}),  # stands in its description alone
    ],
)
def test_a_word_finds_every_setting_with_it(word, first, among):
    keys = [setting.key for setting in find(word)]
    assert first | among <= set(keys) and len(keys) == len(set(keys))
    named = [word.lower() in key.rpartition(".")[2] for key in keys]
    assert named == sorted(named, reverse=True), "names come before descriptions"
    assert all(word.lower() in f"{setting.key} {setting.doc}".lower() for setting in find(word))


def test_without_a_word_there_is_a_line_for_each_section():
    code, shown = run()
    lines = shown.splitlines()
    first = [name for name in Config.model_fields]
    assert code == 0 and [line.split()[0] for line in lines[: len(first)]] == first
    assert "psycho settings training.dpo" in lines[-1] and len(lines) < len(first) + 4


def test_an_environment_is_shown_by_its_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("inference: {env: {HF_TOKEN: hf_secret, OMP_NUM_THREADS: '1'}}\n")
    _, shown = run("inference.env", "--config", str(file))
    assert "hf_secret" not in shown and '{"HF_TOKEN": null, "OMP_NUM_THREADS": "1"}' in shown
