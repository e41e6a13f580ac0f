"""Serve the run's best policy and its reward model over HTTP, until Ctrl-C.

OpenAI-compatible chat at /v1/chat/completions, rewards at /v1/score, readiness at /health. Which policy is best, the
run's own evaluation says; where it sets none apart, or was not done, the furthest trained is served: online, else dpo,
else sft. `serving.policy` names another. What it writes are drafts for a therapist to review.

    python -m ray_jobs.serve --config configs/nano.yaml --set serving.port=8000
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from psycho import storage
from psycho.errors import BadInput
from psycho.evaluation.steps import NAMES, best_sentence
from psycho.evaluation.summary import compared
from psycho.job import Job, main
from psycho.run import Run
from psycho.serving.app import check_port, start, stop

_FINAL_FIRST = ("online", "dpo", "sft")

_READY = """serving {policy}
        {why}
        scored by {reward}
        at {url}
try:    curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\
          -d '{{"messages": [{{"role": "user", "content": "I cannot sleep before exams."}}]}}'
        curl {url}/v1/score -H 'content-type: application/json'{key} \\
          -d '{{"question": "I cannot sleep before exams.", "response": "That sounds exhausting."}}'
Ctrl-C ends it."""


def serve(job: Job) -> None:
    name, why = served_policy(job.run, job.config.serving.policy)
    policy, reward = (job.run.path("models", model) for model in (name, "reward"))
    check_port(job.config.serving.host, job.config.serving.port)
    job.need_ray()
    url = start(job.config, policy, reward)
    try:
        variable = job.config.serving.api_key_env
        key = f' -H "authorization: Bearer ${variable}"' if variable else ""
        print(_READY.format(policy=policy, why=why, reward=reward, url=url, key=key), flush=True)
        _wait_for_interrupt()
    finally:
        stop()
    print("stopped", flush=True)


def served_policy(run: Run, wanted: str = "best") -> tuple[str, str]:
    """The policy to serve (online, dpo or sft), and what the run's evaluation says of that choice.

    Raises:
        BadInput: the run has not trained it, or no reward model.
    """
    there = [name for name in (*_FINAL_FIRST, "reward") if _is_trained(run, name)]
    if "reward" not in there or len(there) < 2:
        missing = "policy" if "reward" in there else "reward model" if there else "models"
        raise BadInput(f"the run in {run.root} has no trained {missing}; run the pipeline first")
    trained = [name for name in there if name != "reward"]
    if wanted != "best" and wanted not in trained:
        raise BadInput(f"serving.policy is {wanted}, which the run in {run.root} has not trained; train it or set best")
    best = compared(run)["best"] if run.is_done("evaluate") else None
    if not best:
        return (trained[0] if wanted == "best" else wanted), "no evaluation says whether it is the best policy"
    close = [best["highest"], *best["not_told_apart"]]
    name = next((name for name in trained if name in close), trained[0]) if wanted == "best" else wanted
    if name not in close:
        return name, f"not the best policy of this run: {best_sentence(best)}"
    if best["policy"]:
        return name, f"the best policy of this run: {best_sentence(best)}"
    others = [NAMES[other] for other in close if other != name]
    return name, f"the run's evaluation cannot tell it apart from {', '.join(others)}"


def _is_trained(run: Run, name: str) -> bool:
    return storage.exists(run.path("models", name, "config.json"))


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
