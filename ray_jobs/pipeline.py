"""The whole loop, one stage after the other; what is done and unchanged is skipped.

    python -m ray_jobs.pipeline --config configs/nano.yaml
    ray job submit --working-dir . -- python -m ray_jobs.pipeline --config configs/nano.yaml

prepare -> generate -> judge -> pair -> train_sft -> train_reward -> train_dpo -> train_online -> evaluate -> report

With `pairs.source` the run is of published pairs: generate and judge are left out.
"""

from __future__ import annotations

import time

from psycho import storage
from psycho.errors import BadInput
from psycho.evaluation.summary import write_summary
from psycho.evaluation.terminal import show_results
from psycho.job import Job, main
from psycho.stages import starts_from_pairs
from psycho.usage import PeakMemory
from ray_jobs.evaluate import evaluate
from ray_jobs.generate import generate
from ray_jobs.judge import judge
from ray_jobs.pair import pair
from ray_jobs.prepare import prepare
from ray_jobs.report import report
from ray_jobs.train_dpo import train_dpo
from ray_jobs.train_online import train_online
from ray_jobs.train_reward import train_reward
from ray_jobs.train_sft import train_sft

STAGES = (prepare, generate, judge, pair, train_sft, train_reward, train_dpo, train_online, evaluate, report)


def pipeline(job: Job) -> None:
    """Run every stage, or those up to `--until` and the report, then write `summary.json` and print the results."""
    started = time.monotonic()
    left_out = (generate, judge) if starts_from_pairs(job.config) else ()
    stages = [stage for stage in STAGES if stage not in left_out and stage.__name__ in job.until]
    job.of = tuple(stage.__name__ for stage in stages)
    with PeakMemory() as memory:
        for stage in stages:
            stage(job)
        if report not in stages:
            _report_so_far(job)
        summary = write_summary(job, time.monotonic() - started, memory.gib)
    show_results(job.progress.console, summary)
    if storage.exists(job.run.path("report.html")):
        job.progress.say(f"report: {job.run.path('report.html')}")
    job.progress.say(f"{time.monotonic() - started:.0f} s, peak memory {memory.gib:.1f} GiB")


def _report_so_far(job: Job) -> None:
    """The report of a run that is not at its end."""
    try:
        report(job)
    except BadInput as error:
        job.progress.say(f"no report yet: {error}")


if __name__ == "__main__":
    main("pipeline", pipeline, __doc__)
