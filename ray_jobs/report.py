"""The report: `report.html`, one self-contained page that says what the run did and how well.

    python -m ray_jobs.report --config configs/nano.yaml

It holds three example comparisons in full. Where client speeches may not leave a place, the report may not either.
A run that stopped earlier gets a page of what is done, which says what is missing; the stage report is done only with
the whole.
"""

from __future__ import annotations

from psycho import storage
from psycho.errors import BadInput
from psycho.evaluation.report import render_report
from psycho.evaluation.summary import build_summary, stage_manifests
from psycho.job import Job, main
from psycho.run import StageResult


def report(job: Job) -> None:
    """Write `report.html`.

    Raises:
        BadInput: nothing in the run folder is done.
    """

    def body(partial: str) -> StageResult:
        storage.write_text(storage.join(partial, "report.html"), _page(job))
        return StageResult(rows_in=1, rows_out=1)

    undone = [name for name in job.run.stages["report"].inputs(job.config) if not job.run.is_done(name)]
    if not undone:
        job.stage("report", body)
        return
    if not stage_manifests(job.run, job.manifests):
        raise BadInput(f"nothing is done in {job.run.root}, so there is nothing to report; run the pipeline first")
    storage.remove(job.run.path("manifests", "report.json"))  # of an earlier, whole page: it is not there any more
    storage.write_text(job.run.path("report.html"), _page(job))
    job.progress.say(f"report: of a run without {', '.join(undone)} -> {job.run.path('report.html')}")


def _page(job: Job) -> str:
    manifests = stage_manifests(job.run, job.manifests)
    seconds = sum(manifest["seconds"] for manifest in manifests.values())
    return render_report(job.run, build_summary(job.run, manifests, seconds, None))


if __name__ == "__main__":
    main("report", report, __doc__)
