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
def test_what_a_person_can_understand_is_one_line_and_an_exit_code(options, tmp_path, capsys, error, code, said):
    assert execute("prepare", raising(error), options) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(said) and err.count("\n") == 1 and "Traceback" not in err
    assert (tmp_path / "run" / "logs").exists() == ("; the traceback is in " in err)
    assert ("; the traceback is in " in err) == (error.__cause__ is not None)


@pytest.mark.parametrize("error", [RuntimeError("boom\nmore"), system_error(errno.EIO, "/x/a"), KeyError("a")])
def test_our_own_mistakes_are_one_line_too_that_names_their_traceback(options, capsys, error):
    assert execute("prepare", raising(error), options) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"failed: {type(error).__name__}: ")
    if not isinstance(error, OSError):  # whose line says all there is
        assert "Traceback" in Path(err.rstrip().rpartition(" ")[2]).read_text()


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

    assert execute("prepare", recipe, replace(options, verbose=True)) == 1
    shown = capsys.readouterr().err
    logged = Path(shown.rstrip().rpartition(" ")[2]).read_text()
    for said in (shown, logged):
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
    monkeypatch.setattr(cluster, "answers", lambda address: True)
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
    monkeypatch.setattr(cluster, "answers", lambda address: True)
    monkeypatch.setattr(ray, "init", init)
    ends = pytest.raises(KeyboardInterrupt) if fails else nullcontext()
    with ends, cluster.ray_session(ClusterConfig(address="head:6379"), verbose=False):
        os.write(2, b" and later\n")
    said = capfd.readouterr().err
    assert said == "the disk of the object store is full\nand so on" + ("" if fails else " and later\n")


def test_what_ray_says_of_each_try_to_reach_a_cluster_is_not_shown_where_a_sentence_says_it(monkeypatch, capfd):
    def refused(**_: Any) -> None:
        os.write(2, b"[W 1 1] gcs_client.cc:210: Failed to get cluster ID from GCS server\n" * 9)
        raise ConnectionError("no")

    monkeypatch.setattr(cluster, "_QUIET", {})
    monkeypatch.setattr(cluster, "_silence_libraries", lambda: None)
    monkeypatch.setattr(cluster, "answers", lambda address: True)
    for name in (cluster.AUTOSCALING, cluster.OWN_RAY, "RAY_BACKEND_LOG_LEVEL"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    with (
        pytest.raises(BadInput, match="does not answer"),
        cluster.ray_session(ClusterConfig(address="head:6379"), verbose=False),
    ):
        pytest.fail("the job went on")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("before", "token"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "token"}, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "mine"}, False),
        ({"RAY_AUTH_TOKEN_PATH": "/mine"}, False),
    ],
)
def test_a_ray_of_our_own_has_a_token_of_its_own_and_leaves_none(tmp_path, monkeypatch, before, token):
    """Ray would put one into ~/.ray for good, and every head that is started later demands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
        if name in before:
            monkeypatch.setenv(name, before[name])
    with cluster.own_token():
        assert len(os.environ.get("RAY_AUTH_TOKEN", "")) == (64 if token else len(before.get("RAY_AUTH_TOKEN", "")))
    after = {name: os.environ[name] for name in os.environ if name.startswith("RAY_AUTH")}
    assert {k: v for k, v in after.items() if k != "RAY_AUTH_MODE"} == {
        k: v for k, v in before.items() if k != "RAY_AUTH_MODE"
    }
    assert after.get("RAY_AUTH_MODE") == before.get("RAY_AUTH_MODE") or not token


@pytest.mark.parametrize("folder", ["", " "])
def test_an_empty_run_folder_is_one_sentence(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    assert execute("prepare", raising(RuntimeError()), Options(run_dir=folder)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --run-dir or run_dir is empty; name a folder") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EROFS, "Read-only file system"), (errno.ENOENT, "No such file"), (errno.EACCES, "Permission denied")],
)
def test_a_run_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch, number, said):
    def refused(*_: Any, **__: Any) -> None:
        raise system_error(number)

    monkeypatch.setattr(Path, "mkdir", refused)
    assert execute("prepare", raising(RuntimeError()), Options(run_dir=str(tmp_path / "run"))) == 2
    err = capsys.readouterr().err
    assert f"run folder {tmp_path / 'run'} cannot be written ({said}" in err and err.count("\n") == 1


def test_a_folder_of_the_kernels_is_no_run_folder(capsys):
    assert execute("prepare", raising(RuntimeError()), Options(run_dir="/proc/x")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run folder /proc/x cannot be written (") and err.count("\n") == 1


def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path, capsys):
    from psycho.lease import held

    folder = tmp_path / "run"
    with held(str(folder)):
        before = {path.name: path.read_text() for path in folder.iterdir()}
        assert execute("prepare", raising(RuntimeError()), Options(run_dir=str(folder))) == 2
        assert f"in use by process {os.getpid()} on" in capsys.readouterr().err
        assert {path.name: path.read_text() for path in folder.iterdir()} == before
        assert execute("export", lambda job: None, Options(run_dir=str(folder))) == 0, "a reader needs no lease"


@pytest.mark.parametrize("error", [None, RuntimeError("x"), BadInput("x"), KeyboardInterrupt()])
def test_the_folder_is_free_after_a_job_however_it_ended(tmp_path, error):
    def recipe(job: Job) -> None:
        assert (tmp_path / "run" / "lease.json").exists()
        if error:
            raise error

    execute("prepare", recipe, Options(run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "lease.json").exists()


def test_a_stage_stops_where_the_folder_was_taken_over(options, capsys):
    def recipe(job: Job) -> None:
        assert job._lease is not None
        job._lease.lost = True
        job.stage("prepare", lambda partial: pytest.fail("it went on"))

    assert execute("prepare", recipe, options) == 2
    assert "taken over by another process" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["export", "serve"])
def test_a_job_that_reads_makes_no_folder_and_changes_no_configuration(tmp_path, job):
    folder = tmp_path / "run"
    assert execute(job, lambda job: None, Options(run_dir=str(folder))) == 0 and not folder.exists()
    assert execute("prepare", lambda job: None, Options(run_dir=str(folder))) == 0
    before = (folder / "config.yaml").read_text()
    assert execute(job, lambda job: None, Options(overrides=("seed=5",), run_dir=str(folder))) == 0
    assert (folder / "config.yaml").read_text() == before


def test_a_pipeline_says_which_of_its_stages_it_is_at(options, capsys):
    def recipe(job: Job) -> None:
        def body(partial: str) -> StageResult:
            Path(partial, "speeches").mkdir(parents=True)
            return StageResult()

        job.of = ("prepare", "generate", "judge")
        job.stage("prepare", body)

    assert execute("pipeline", recipe, options) == execute("pipeline", recipe, options) == 0
    said = capsys.readouterr().err
    assert "stage 1 of 3: prepare\n" in said and "stage 1 of 3: prepare: done before, skipped" in said


def test_until_an_unknown_stage_is_refused_with_the_list(tmp_path, capsys):
    options = Options(run_dir=str(tmp_path / "run"), until="pairs")
    assert execute("pipeline", raising(RuntimeError()), options) == 2
    err = capsys.readouterr().err
    assert "--until pairs: there is no such stage; the stages are prepare, generate, judge, pair," in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("last", "count"), [("prepare", 1), ("pair", 4), ("report", 10), (None, 10)])
def test_until_a_stage(options, last, count):
    seen: list[tuple[str, ...]] = []
    assert execute("pipeline", lambda job: seen.append(job.until), replace(options, until=last)) == 0
    assert len(seen[0]) == count and (last is None or seen[0][-1] == last)


def test_until_is_the_pipelines_alone():
    from ray_jobs.cli import app

    assert "--until" in CliRunner().invoke(app, ["pipeline", "--help"], env={"COLUMNS": "200"}).output
    shown = CliRunner().invoke(app, ["judge", "--help"], env={"COLUMNS": "200"}).output
    assert "--until" not in shown and "--calibrate" in shown and "143 by SIGTERM" in " ".join(shown.split())
