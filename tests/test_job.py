"""The frame around every job: options, exit codes, and one sentence for what a person can put right."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import typer
from pydantic import TypeAdapter
from typer.testing import CliRunner

from psycho import cluster, job
from psycho.config import ClusterConfig
from psycho.errors import BadInput, StageFailed, WaitTimedOut
from psycho.job import DEFAULT_CONFIG, Job, Options, execute, explain, register
from psycho.run import StageResult


def system_error(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


def chained(inner: BaseException, how: str) -> Exception:
    """`inner` below a StageFailed: as its cause, its context, or Ray's `cause` attribute two levels down."""
    outer = StageFailed("a worker died")
    if how == "ray":
        task = RuntimeError("task failed")
        task.cause = inner
        outer.__cause__ = task
    else:
        setattr(outer, f"__{how}__", inner)
    return outer


def raising(error: BaseException) -> Callable[[Job], None]:
    def recipe(_: Job) -> None:
        raise error

    return recipe


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(run_dir=str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadInput("give a file"), 2, "error: give a file"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
        (StageFailed("judge: counts do not balance"), 1, "failed: StageFailed: judge: counts do not balance"),
        (WaitTimedOut("a worker", 7.0), 1, "failed: WaitTimedOut: waited 7 s for a worker and gave up"),
        (
            WaitTimedOut("a worker", 7.0, "a.limit_s"),
            1,
            "failed: WaitTimedOut: waited 7 s for a worker and gave up; raise",
        ),
        (system_error(errno.ENOSPC, "/x/a"), 2, "error: the disk is full while writing /x/a; free some space"),
        (system_error(errno.EADDRINUSE), 2, "error: the port is in use; choose another"),
        (chained(BadInput("give a file"), "cause"), 2, "error: give a file"),
        (chained(system_error(errno.ENOSPC), "cause"), 2, "error: the disk is full"),
        (chained(system_error(errno.ENOSPC), "context"), 2, "error: the disk is full"),
        (chained(system_error(errno.ENOSPC), "ray"), 2, "error: the disk is full"),
        (chained(RuntimeError("IOError: No space left on device"), "cause"), 2, "error: the disk is full"),
        (chained(system_error(errno.EADDRINUSE), "cause"), 2, "error: the port is in use"),
    ],
)
def test_what_a_person_can_understand_is_one_line_and_an_exit_code(options, capsys, error, code, said):
    assert execute("prepare", raising(error), options) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(said) and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("error", [RuntimeError("boom\nmore"), system_error(errno.EIO, "/x/a"), KeyError("a")])
def test_our_own_mistakes_come_with_their_traceback(options, capsys, error):
    assert execute("prepare", raising(error), options) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith(f"failed: {type(error).__name__}: ")


CELL = "what a client\nsaid"  # never written out below: a traceback shows lines of code


@pytest.mark.parametrize(
    "fails",
    [
        lambda: pa.Table.from_pylist([{"a": 1}, {"a": CELL}]),
        lambda: int(CELL),
        lambda: float(CELL),
        lambda: TypeAdapter(int).validate_python(CELL),
    ],
)
def test_no_error_shows_a_cell(options, capsys, fails):
    def recipe(_: Job) -> None:
        fails()

    assert execute("prepare", recipe, options) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "what it quotes is not shown" in said
    assert "what a client" not in said and "said" not in said


def test_a_failed_stage_shows_its_traceback_when_asked(options, capsys):
    assert execute("prepare", raising(StageFailed("x")), Options(run_dir=options.run_dir, verbose=True)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_done_is_0_and_the_folder_holds_the_resolved_configuration(options, tmp_path):
    assert execute("prepare", lambda job: None, options) == 0
    assert f"run_dir: {tmp_path / 'run'}" in (tmp_path / "run" / "config.yaml").read_text()


def test_an_error_that_leads_back_to_itself_ends():
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert explain(one) is None


def test_bad_input_on_a_ray_worker_is_the_same_sentence():
    from ray.exceptions import RayTaskError

    remote = RayTaskError("f", "Traceback (most recent call last):\n  ...", BadInput("give a file"))
    assert explain(remote.as_instanceof_cause()) == "give a file"


def test_markup_in_a_message_is_shown_as_it_is(options, capsys):
    execute("prepare", raising(BadInput("no column [red]question[/red] in [a]")), options)
    assert capsys.readouterr().err == "error: no column [red]question[/red] in [a]\n"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("training.dpo.bata=1",), "did you mean training.dpo.beta?"),
        (("policy=",), "policy"),
        (("policy=''",), "policy is empty"),
        (("policy=nano:nobody",), "the nano models are"),
        (("policy=./no/such/folder",), "does not exist"),
        (("generation.pool=[]",), "generation.pool is empty"),
    ],
)
def test_a_wrong_configuration_stops_before_the_recipe_and_writes_nothing(tmp_path, capsys, overrides, said):
    ran: list[Job] = []
    options = Options(overrides=overrides, run_dir=str(tmp_path / "run"))
    assert execute("prepare", ran.append, options) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not ran and not list(tmp_path.iterdir())


def test_a_dry_run_touches_nothing(tmp_path, capsys):
    ran: list[Job] = []
    assert execute("prepare", ran.append, Options(run_dir=str(tmp_path / "run"), dry_run=True)) == 0
    assert not ran and not list(tmp_path.iterdir()) and "prepare" in capsys.readouterr().out


def command(monkeypatch: pytest.MonkeyPatch, code: int = 0) -> tuple[typer.Typer, list[Any]]:
    seen: list[Any] = []

    def fake(name: str, recipe: Any, options: Options) -> int:
        seen.append((name, options))
        return code

    monkeypatch.setattr(job, "execute", fake)
    app = typer.Typer()
    register(app, "prepare", lambda job: None, "Client speeches.")
    return app, seen


def test_options_reach_the_job(monkeypatch, tmp_path):
    app, seen = command(monkeypatch)
    assert CliRunner().invoke(app, []).exit_code == 0
    sets = ["--set", "seed=1", "--set", "pairs.min_gap=0.5"]
    arguments = ["--config", "a.yaml", *sets, "--run-dir", "s3://b/run", "--dry-run", "-v"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == [
        ("prepare", Options(DEFAULT_CONFIG)),
        ("prepare", Options(Path("a.yaml"), ("seed=1", "pairs.min_gap=0.5"), "s3://b/run", True, True)),
    ]


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_the_exit_code_is_the_jobs(monkeypatch, code):
    app, _ = command(monkeypatch, code)
    assert CliRunner().invoke(app, []).exit_code == code


def test_an_unknown_option_is_2_and_help_speaks(monkeypatch):
    app, seen = command(monkeypatch)
    assert CliRunner().invoke(app, ["--sett", "seed=1"]).exit_code == 2 and not seen
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(word in shown for word in ("Client speeches.", "--config", "--set", "--run-dir", "--dry-run"))


def test_a_stage_that_is_done_neither_runs_nor_needs_ray(options, capsys):
    bodies: list[str] = []

    def recipe(job: Job) -> None:
        def body(partial: str) -> StageResult:
            bodies.append(partial)
            Path(partial, "speeches").mkdir(parents=True)
            return StageResult(rows_in=1200, rows_out=1199, tokens=5, quarantine=[{"row": 1, "reason": "r"}])

        job.stage("prepare", body)

    assert execute("prepare", recipe, options) == execute("prepare", recipe, options) == 0
    said = capsys.readouterr().err
    assert len(bodies) == 1 and "prepare: 1,199 rows, 1 left out (1 r), 5 tokens" in said
    assert "prepare: done before, skipped" in said


def test_unfinished_work_of_other_settings_is_said_once(options, capsys):
    def recipe(job: Job) -> None:
        def body(partial: str) -> StageResult:
            Path(partial, "speeches").mkdir(parents=True, exist_ok=True)
            raise StageFailed("lost")

        job.stage("prepare", body)

    other = replace(options, overrides=(*options.overrides, "seed=77"))
    for tried in (options, other, other):
        assert execute("prepare", recipe, tried) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("note: prepare was interrupted under other settings and begins anew") == 1
    assert "is removed once it is done, and gone on from if those settings come back" in said


def test_too_little_memory_is_said_before_ray_starts(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_QUIET", {})
    monkeypatch.setenv(cluster.AUTOSCALING, "0")  # the session sets it; to be put back
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with (
        pytest.raises(BadInput, match=r"needs 100000 GiB of free memory .* lower cluster.min_memory_gib"),
        cluster.ray_session(ClusterConfig(min_memory_gib=100_000), verbose=True),
    ):
        pytest.fail("the job went on")


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    def refused(**_: Any) -> None:
        raise ConnectionError("no")

    monkeypatch.setattr(cluster, "_QUIET", {})
    monkeypatch.setenv(cluster.AUTOSCALING, "0")  # the session sets it; to be put back
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    with (
        pytest.raises(BadInput, match=r"Ray at head:6379 does not answer \(ConnectionError\)"),
        cluster.ray_session(ClusterConfig(address="head:6379"), verbose=True),
    ):
        pytest.fail("the job went on")


@pytest.mark.parametrize("fails", [False, True])
def test_ray_says_nothing_of_its_log_level_and_its_errors_are_heard(monkeypatch, capfd, fails):
    def init(**_: Any) -> None:
        os.write(2, b"[1 1] logging.cc:303: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3\n")
        os.write(2, b"the disk of the object store is full\nand so on")
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "_QUIET", {})
    monkeypatch.setattr(cluster, "_silence_libraries", lambda: None)
    for name in (cluster.AUTOSCALING, cluster.OWN_RAY, "RAY_BACKEND_LOG_LEVEL"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", init)
    ends = pytest.raises(KeyboardInterrupt) if fails else nullcontext()
    with ends, cluster.ray_session(ClusterConfig(address="head:6379"), verbose=False):
        os.write(2, b" and later\n")
    said = capfd.readouterr().err
    assert said == "the disk of the object store is full\nand so on" + ("" if fails else " and later\n")
