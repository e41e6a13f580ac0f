"""Secrets: nothing that a run writes or says holds one, no key depends on one, and they reach the workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from psycho import secrets
from psycho.config import EngineConfig, build_config, load_config, to_yaml
from psycho.errors import BadInput
from psycho.evaluation.summary import build_summary
from psycho.inference.worker import EngineSpec, VLLMWorker
from psycho.job import Job, Options, execute
from psycho.plan import print_plan
from psycho.run import Run
from psycho.settings import changed
from psycho.stages import STAGES
from psycho.training.launch import _environment

NANO = Path(__file__).parents[1] / "configs" / "nano.yaml"
TOKEN = "hf_thisIsASecretToken"
SETS = tuple(f"{section}.env.{name}={TOKEN}" for section in ("inference", "training") for name in ("HF_TOKEN", "MINE"))


def everything_below(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("HF_TOKEN", False),
        ("OPENAI_API_KEY", False),
        ("VLLM_API_KEY", False),
        ("RAY_AUTH_TOKEN", False),
        ("AWS_SECRET_ACCESS_KEY", False),
        ("DATABASE_URL", False),
        ("MINE", False),
        ("HF_TOKEN_PATH", True),
        ("LD_LIBRARY_PATH", True),
        ("HF_HOME", True),
        ("OMP_NUM_THREADS", True),
        ("VLLM_CPU_KVCACHE_SPACE", True),
        ("TOKENIZERS_PARALLELISM", True),
    ],
)
def test_which_variables_are_written_with_their_values(name, written):
    assert secrets.may_be_written(name) == written
    config = build_config({"inference": {"env": {name: "value"}}, "training": {"env": {name: "value"}}}, "x")
    shown = yaml.safe_load(to_yaml(config))
    for section in ("inference", "training"):
        assert shown[section]["env"] == {name: "value" if written else None}


def test_nothing_that_a_run_writes_or_says_holds_it(tmp_path, capsys):
    def recipe(job: Job) -> None:
        job.run._ledger("prepare", "done", 0.0, job_result())
        job.progress.say(str(job.config.inference))
        raise RuntimeError(f"the server says that {job.config.inference.env['MINE']} is no token")

    def job_result() -> Any:
        from psycho.run import StageResult

        return StageResult()

    options = Options(NANO, SETS, str(tmp_path / "run"), verbose=True)
    assert execute("prepare", recipe, options) == 1
    said = "".join(capsys.readouterr())
    assert "(hidden) is no token" in said and TOKEN not in said
    assert "logs" in said and (tmp_path / "run" / "logs").is_dir()
    assert TOKEN not in everything_below(tmp_path)
    assert execute("prepare", recipe, Options(NANO, SETS, str(tmp_path / "run"), dry_run=True)) == 0
    assert TOKEN not in "".join(capsys.readouterr())


def test_neither_do_plan_settings_and_summary(tmp_path):
    import io
    import json

    from rich.console import Console

    config = load_config(NANO, SETS, str(tmp_path))
    out = io.StringIO()
    print_plan(config, "pipeline", Console(file=out, width=200))
    told = [
        out.getvalue(),
        str(changed(config)),
        json.dumps(build_summary(Run(config, STAGES), {}, 0.0, None)),
        repr(config),
    ]
    assert not any(TOKEN in text for text in told)
    assert '"HF_TOKEN": null' in told[1]


def test_an_environment_variable_that_is_secret_is_taken_out_of_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", TOKEN)

    def recipe(job: Job) -> None:
        raise RuntimeError(f"401 with {TOKEN}")

    assert execute("prepare", recipe, Options(run_dir=str(tmp_path / "run"))) == 1
    assert TOKEN not in capsys.readouterr().err + everything_below(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "inference.env.HF_TOKEN=1234567890123",  # a number, where text is wanted
        "inference.env=1234567890123",
        "inference.env.HF_TOKEN:1234567890123",
        "inference.engine.extra.hf_token='1234567890123'",
        "inference.engine.extra.api_key='1234567890123'",
    ],
)
def test_no_mistake_quotes_it(override):
    with pytest.raises(BadInput) as caught:
        load_config(NANO, [override])
    assert "1234567890123" not in str(caught.value)


def test_a_value_that_is_no_secret_is_still_quoted():
    with pytest.raises(BadInput, match=r"max_tokens: .* \(given: 'many'\)"):
        load_config(NANO, ["judge.max_tokens=many"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run_dir=s3://me:pass@bucket/run", "run_dir holds a password in its address"),
        ("inference.engine.extra.hf_token=abc", "inference.engine.extra.hf_token holds a secret"),
    ],
)
def test_secrets_where_they_would_be_written_are_refused(override, said):
    with pytest.raises(BadInput, match=said) as caught:
        load_config(NANO, [override])
    assert "pass@" not in str(caught.value) and "abc" not in str(caught.value)


@pytest.mark.parametrize("setting", ["inference.env.HF_TOKEN", "training.env.HF_TOKEN"])
def test_no_key_depends_on_its_value(setting):
    def keys(value: str) -> dict[str, str]:
        run = Run(load_config(NANO, [f"{setting}={value}"]), STAGES)
        return {stage.name: run.key(stage.name) for stage in STAGES}

    assert keys(TOKEN) == keys("another")


def test_a_name_without_a_value_is_taken_from_the_environment_of_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    seen: list[Job] = []
    options = Options(NANO, ("inference.env.MY_TOKEN=null",), str(tmp_path / "run"))
    assert execute("prepare", seen.append, options) == 2
    assert "inference.env.MY_TOKEN has no value, so the environment" in capsys.readouterr().err and not seen
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    assert execute("prepare", seen.append, options) == 0
    assert seen[0].config.inference.env["MY_TOKEN"] == TOKEN


def test_a_runs_own_configuration_can_be_given_again(tmp_path, monkeypatch):
    seen: list[Job] = []
    assert execute("prepare", seen.append, Options(NANO, SETS, str(tmp_path / "run"))) == 0
    for name in ("HF_TOKEN", "MINE"):
        monkeypatch.setenv(name, TOKEN)
    assert execute("prepare", seen.append, Options(tmp_path / "run" / "config.yaml")) == 0
    assert seen[0].config == seen[1].config


def test_it_reaches_the_worker_and_not_what_ray_writes_down(monkeypatch):
    """Ray writes a runtime environment into its logs and shows it on its dashboard."""
    env = {"HF_TOKEN": TOKEN, "MINE": "1", "OMP_NUM_THREADS": "1", "LEFT": None}
    assert secrets.at_start(env) == {"OMP_NUM_THREADS": "1"}
    training = build_config({"training": {"env": env}}, "x").training
    assert "HF_TOKEN" not in _environment(training) and _environment(training)["OMP_NUM_THREADS"] == "1"
    for name in [*env, "VLLM_LOGGING_LEVEL", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"]:
        monkeypatch.setenv(name, "before")
    spec = EngineSpec(EngineConfig(), env=env, verbose=True)
    assert TOKEN not in repr(spec)
    VLLMWorker(spec)
    assert os.environ["HF_TOKEN"] == TOKEN and os.environ["LEFT"] == "before"
