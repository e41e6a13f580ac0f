"""Serve the run's final policy and its reward model over HTTP, until Ctrl-C.

OpenAI-compatible chat at /v1/chat/completions, rewards at /v1/score, readiness at /health. The final policy
is the last one the run has trained: online, else dpo, else sft. What it writes are drafts for a therapist to
review.

    python -m ray_jobs.serve --config configs/nano.yaml --set serving.port=8000
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from psycho import storage
from psycho.errors import BadInput
from psycho.job import Job, main
from psycho.run import Run
from psycho.serving.app import check_port, start, stop

_FINAL_FIRST = ("online", "dpo", "sft")

_READY = """serving {policy}
        scored by {reward}
        at {url}
try:    curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\
          -d '{{"messages": [{{"role": "user", "content": "I cannot sleep before exams."}}]}}'
        curl {url}/v1/score -H 'content-type: application/json'{key} \\
          -d '{{"question": "I cannot sleep before exams.", "response": "That sounds exhausting."}}'
Ctrl-C ends it."""


def serve(job: Job) -> None:
    policy, reward = final_models(job.run)
    check_port(job.config.serving.host, job.config.serving.port)
    job.need_ray()
    url = start(job.config, policy, reward)
    try:
        variable = job.config.serving.api_key_env
        key = f' -H "authorization: Bearer ${variable}"' if variable else ""
        print(_READY.format(policy=policy, reward=reward, url=url, key=key), flush=True)
        _wait_for_interrupt()
    finally:
        stop()
    print("stopped", flush=True)


def final_models(run: Run) -> tuple[str, str]:
    """The folders of the last trained policy and of the reward model.

    Raises:
        BadInput: the run has not trained them.
    """
    folders = {name: run.path("models", name) for name in (*_FINAL_FIRST, "reward")}
    trained = [name for name, folder in folders.items() if storage.exists(storage.join(folder, "config.json"))]
    if "reward" not in trained or len(trained) < 2:
        missing = "policy" if "reward" in trained else "reward model" if trained else "models"
        raise BadInput(f"the run in {run.root} has no trained {missing}; run the pipeline first")
    return folders[trained[0]], folders["reward"]


def _wait_for_interrupt() -> None:
    """Until Ctrl-C, or the SIGTERM of `ray job stop`: both are the proper end of a server."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main("serve", serve, __doc__)
