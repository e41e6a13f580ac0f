"""What went wrong, in a line: the innermost cause of what comes from a worker, and what to change."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from psycho import failures
from psycho.errors import BadInput, StageFailed
from psycho.failures import cause, engine_failure, explain, is_plain, write_log
from psycho.inference.loop import EngineFailed, EngineLoop
from psycho.job import Job, Options, execute

TYPE_ERROR = "TypeError: EngineArgs.__init__() got an unexpected keyword argument 'nonsense'"
REMOTE = """ray::MapWorker(MapBatches(Durable)).submit() (pid=1, ip=127.0.0.1)
Traceback (most recent call last):
  File "vllm/llm.py", line 1, in __init__
    trust_remote_code=trust_remote_code,
TypeError: EngineArgs.__init__() got an unexpected keyword argument 'nonsense'

The above exception was the direct cause of the following exception:

ray::MapWorker(MapBatches(Durable)).submit() (pid=1, ip=127.0.0.1)
Traceback (most recent call last):
  File "ray/data.py", line 2, in apply
    raise UserCodeException("UDF failed to process a data block.") from error
ray.exceptions.UserCodeException: UDF failed to process a data block."""


def ray_error(text: str, inner: Exception) -> BaseException:
    return RayTaskError("f", text, inner).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TypeError("EngineArgs.__init__() got an unexpected keyword argument 'foo'"), "knows no argument foo; take it"),
        (OSError("You are trying to access a gated repo.\nMake sure to have access"), "export HF_TOKEN"),
        (ValueError("Invalid repository ID or local directory specified: 'a/b'."), "look at its name"),
        (OSError("a/b is not a local folder and is not a valid model identifier listed on"), "look at its name"),
        (OSError("We couldn't connect to 'https://hub' to load the files"), "the hub cannot be reached"),
        (ValueError("contains custom code; pass the argument `trust_remote_code=True`"), "trust_remote_code=true"),
        (ValueError("Free memory on device cuda:0 (1/24 GiB) on startup is less than desired GPU memory utilization"),
         "lower engine.gpu_memory_utilization"),
        (ValueError("No available memory for the cache blocks."), "raise engine.gpu_memory_utilization"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "training.bin_tokens"),
        (MemoryError(), "the machine's memory is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "end other programs"),
    ],
)  # fmt: skip
def test_known_causes_of_an_engine_name_the_model_and_the_setting(error, said):
    failure = engine_failure(error, "owner/model")
    assert isinstance(failure, BadInput) and "\n" not in str(failure)
    assert str(failure).startswith("model owner/model does not start: ") and said in str(failure)
    travelled = pickle.loads(pickle.dumps(EngineFailed("the engine failed")))
    travelled.cause = failure
    assert explain(ray_error("...", travelled)) == str(failure)


def test_an_unknown_cause_of_an_engine_is_its_first_line():
    failure = engine_failure(RuntimeError("boom\nmore"), "owner/model")
    assert isinstance(failure, StageFailed) and str(failure) == "model owner/model does not start: RuntimeError: boom"


def test_a_validation_error_is_told_by_what_it_is_about():
    said = (
        "1 validation error for ModelConfig\n  Value error, max_model_len (9) is greater than 7 [type=value_error, x]"
    )
    failure = engine_failure(ValueError(said), "owner/model")
    assert (
        str(failure) == "model owner/model does not start: ValueError: Value error, max_model_len (9) is greater than 7"
    )


def test_ours_travels_through_the_loop_and_over_the_wire():
    def hold(model: str) -> None:
        raise BadInput(f"model {model} does not start")

    with pytest.raises(EngineFailed) as caught:
        list(EngineLoop(hold, 1).answers("m", ["prompt"], [None]))
    travelled = pickle.loads(pickle.dumps(caught.value))
    assert explain(ray_error("...", travelled)) == "model m does not start"


def test_the_innermost_cause_of_a_workers_traceback():
    error = ray_error(REMOTE, RuntimeError("UDF failed to process a data block."))
    assert explain(error) is not None and "knows no argument nonsense" in str(explain(error))
    other = REMOTE.replace(
        "TypeError: EngineArgs.__init__() got an unexpected keyword argument 'nonsense'", "KeyError: 7"
    )
    assert explain(ray_error(other, RuntimeError())) is None, "a line of code was taken for a message"
    carried = ray_error(other, RuntimeError("UDF failed to process a data block."))
    assert cause(carried) == ("KeyError", "7"), "Ray Data's own error was taken for the cause"
    died = ActorDiedError.from_task_error(RayTaskError("f", other, KeyError(7)))
    assert cause(died) == ("KeyError", "7")


def test_a_sentence_of_ours_comes_before_what_is_known_of_its_cause():
    text = f"{REMOTE}\n\n{failures._RAISED_FROM}:\n\npsycho.errors.BadInput: model m"
    assert explain(ray_error(text, RuntimeError())) == "model m"
    failed = EngineFailed("the engine failed")
    failed.cause = BadInput("model n")
    assert explain(ray_error(REMOTE, failed)) == "model n"


def test_ours_is_kept_as_it_is():
    lost = StageFailed("a worker died; give the same command again")
    lost.__cause__ = RuntimeError("socket closed")
    assert cause(lost) == ("StageFailed", str(lost)) and explain(lost) is None
    lost.__cause__ = RuntimeError("CUDA out of memory")
    assert "the GPU's memory is full" in str(explain(lost))


def test_a_worker_that_finds_the_disk_full():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/part")
    assert "the disk is full" in str(explain(ray_error(REMOTE.replace(TYPE_ERROR, f"OSError: {full}"), full)))


def test_what_a_person_sees_of_a_workers_failure(tmp_path, capsys):
    def recipe(job: Job) -> None:
        raise ray_error(
            REMOTE.replace("TypeError: EngineArgs", "KeyError: Args").replace("unexpected", "x"), KeyError(7)
        )

    assert execute("generate", recipe, Options(run_dir=str(tmp_path / "run"))) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("failed: KeyError: ") and "RayTaskError" not in err
    [log] = (tmp_path / "run" / "logs").iterdir()
    assert f"the traceback is in {log}" in err and "Traceback" in log.read_text()


@pytest.mark.parametrize("root", [None, "s3://bucket/run", "/no/such/folder"])
def test_the_log_is_a_temporary_file_where_the_run_folder_is_not_here(root):
    path = write_log(ValueError("x"), "judge", root)
    assert path is not None and Path(path).stat().st_mode & 0o077 == 0 and "ValueError: x" in Path(path).read_text()
    Path(path).unlink()


def test_the_log_holds_no_cell_and_no_secret(tmp_path):
    error = ValueError("invalid literal for int() with base 10: 'what a client said', token abcdef")
    path = write_log(error, "judge", str(tmp_path), ["abcdef"])
    assert path is not None
    text = Path(path).read_text()
    assert "client said" not in text and "abcdef" not in text and "is not shown" in text


def test_no_room_for_a_log_is_no_further_failure(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(failures.storage, "write_text", full)
    monkeypatch.setattr(failures.tempfile, "mkstemp", full)
    assert write_log(ValueError("x"), "judge", str(tmp_path)) is None


def test_what_needs_no_log():
    behind = StageFailed("x")
    behind.__cause__ = RuntimeError()
    assert is_plain(BadInput("x")) and is_plain(OSError(errno.ENOSPC, "x")) and is_plain(StageFailed("x"))
    assert not any(map(is_plain, (behind, RuntimeError(), ray_error("...", OSError()))))
