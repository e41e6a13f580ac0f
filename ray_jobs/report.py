"""The report: `report.html`, one self-contained page that says what the run did and how well.

    python -m ray_jobs.report --config configs/nano.yaml

It holds three example comparisons in full. Where client speeches may not leave a place, the report may not either.
"""

from __future__ import annotations

from psycho import storage
from psycho.evaluation.report import render_report
from psycho.evaluation.summary import build_summary, stage_manifests
from psycho.job import Job, main
from psycho.run import StageResult


def report(job: Job) -> None:
    """Write `report.html`."""

    def body(partial: str) -> StageResult:
        manifests = stage_manifests(job.run, job.manifests)
        seconds = sum(manifest["seconds"] for manifest in manifests.values())
        summary = build_summary(job.run, manifests, seconds, None)
        storage.write_text(storage.join(partial, "report.html"), render_report(job.run, summary))
        return StageResult(rows_in=1, rows_out=1)

    job.stage("report", body)


if __name__ == "__main__":
    main("report", report, __doc__)
