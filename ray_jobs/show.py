"""A sample of the run's pairs or responses as a sheet that a clinician can read: one HTML page, or a CSV.

    python -m ray_jobs.show --config configs/nano.yaml --to sheet.html
    python -m ray_jobs.show --config configs/nano.yaml --to sheet.csv --what responses --n 20 --by principle

It holds client speech. Where that may not leave a place, the sheet may not either.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, cast

import typer

from psycho import storage
from psycho.errors import BadInput
from psycho.job import DEFAULT_CONFIG, ConfigFile, Job, Options, Overrides, RunDir, execute
from psycho.preferences.export import SPLITS
from psycho.preferences.forms import responses_of_pairs
from psycho.preferences.sheet import By, html, pair_entries, pick, response_entries, table
from psycho.stages import starts_from_pairs
from ray_jobs.export import judge_name, rated_by_split, run_concerns


class What(StrEnum):
    """What a sheet may show."""

    pairs = "pairs"
    responses = "responses"


class Picked(StrEnum):
    """How it may be picked (`sheet.pick`)."""

    gap = "gap"
    random = "random"
    principle = "principle"


def show(job: Job, to: str, what: str = "pairs", count: int = 50, seed: int = 0, by: str = "gap") -> None:
    """Write the sheet.

    Raises:
        BadInput: the stage is not done, `to` is there already or is neither .html nor .csv, or nothing is to show.
    """
    suffix = PurePosixPath(to).suffix.lower()
    if suffix not in (".html", ".csv"):
        raise BadInput(f"--to {to} ends in {suffix or 'nothing'!r}; give .html or .csv")
    if storage.exists(to):
        raise BadInput(f"{to} is there already, and may hold somebody's notes; give another name with --to")
    imported = starts_from_pairs(job.config)
    stage = "pair" if what == "pairs" or imported else "judge"
    if not job.run.is_done(stage):
        raise BadInput(f"stage {stage} is not done in {job.run.root}; run it first")
    entries = _entries(job, what, imported)
    if not entries:
        raise BadInput(f"{job.run.root} holds no {what} to show")
    shown = pick(entries, count, cast(By, by), seed)
    facts = {
        "name": job.config.name, "judge": judge_name(job.config), "what": what, "by": by, "of": len(entries),
        "concerns": run_concerns(job.run)[1],
    }  # fmt: skip
    storage.write_text(to, html(shown, facts) if suffix == ".html" else table(shown))
    job.progress.say(f"{len(shown):,} of {len(entries):,} {what} -> {to} (it holds client speech)")


def _entries(job: Job, what: str, imported: bool) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = []
    if what == "pairs" or imported:
        for split in SPLITS:
            folder = job.run.path("preferences", split)
            if any(storage.parquet_files(folder)):
                pairs += storage.read_table(folder).to_pylist()
    own = [] if imported else [row for rows in rated_by_split(job).values() for row in rows]
    if what == "pairs":
        return pair_entries(pairs, own)
    return response_entries(responses_of_pairs(pairs) if imported else own)


def command(
    to: Annotated[str, typer.Option(help="file of the sheet: .html or .csv, a path or an s3:// or gs:// URI")],
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Overrides = None,
    run_dir: RunDir = None,
    what: Annotated[What, typer.Option(help="what to show")] = What.pairs,
    n: Annotated[int, typer.Option("--n", min=1, help="at most so many")] = 50,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    by: Annotated[
        Picked,
        typer.Option(help="gap: spread over the gaps, the widest first; random; principle: each in turn, its extremes"),
    ] = Picked.gap,
) -> None:
    """pairs or responses with ratings and evidence as a sheet for a clinician, HTML or CSV; it holds client speech"""

    def recipe(job: Job) -> None:
        show(job, to, what.value, n, seed, by.value)

    raise typer.Exit(execute("show", recipe, Options(config, tuple(set_ or ()), run_dir)))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
    app.command()(command)
    app()
