"""The run's pairs as a data set: Parquet shards in the published schema with a card, on disk or on the hub.

    python -m ray_jobs.export --config configs/nano.yaml --to data/pairs --licence cc-by-nc-4.0
    python -m ray_jobs.export --config configs/nano.yaml --to data/pairs --licence cc-by-nc-4.0 --push owner/name
    python -m ray_jobs.export --config configs/nano.yaml --to data/pairs --what pairs,kto,ranked
    python -m ray_jobs.export --config configs/nano.yaml --to data/pairs --dry-run

Data that should not be passed on (an unfit judge, too many failed ratings) are refused; --anyway writes them with a
stamp on the card. Nothing leaves the machine without --push, and what is pushed is private until you say --public.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from psycho import storage
from psycho.config import Config, QualityConfig
from psycho.errors import BadInput
from psycho.job import DEFAULT_CONFIG, ConfigFile, Job, Options, Overrides, RunDir, execute
from psycho.preferences.build import split_of
from psycho.preferences.export import check_target, count_pairs, export_pairs, push
from psycho.preferences.forms import FORMS
from psycho.quality import concerns, quality_facts
from psycho.run import Run
from psycho.stages import STAGES, starts_from_pairs
from ray_jobs.pair import rated_speeches

UNKNOWN = "unknown"
_MADE = ("generate", "judge", "pair")


def export(
    job: Job, to: str, licence: str = UNKNOWN, source: str | None = None, repository: str | None = None,
    public: bool = False, rows_per_shard: int = 50_000, what: Sequence[str] = FORMS, anyway: bool = False,
) -> None:  # fmt: skip
    """Write the data set to `to`, and push it where a repository is named.

    Raises:
        BadInput: the pairs are not done, the folder is not empty, a push lacks a licence or a local folder, or the data
            should not be passed on.
    """
    check(job.run, to, licence, repository, anyway)
    facts = card_facts(job, licence, source)
    rated = None if starts_from_pairs(job.config) else rated_by_split(job)
    written = export_pairs(
        job.run.path("preferences"), to, facts, rows_per_shard, what, rated, job.config.training.sft.min_overall
    )
    for form, counts in written.items():
        job.progress.say(f"{_told(counts) or 'no'} {form} -> {to}")
    if facts["concerns"]:
        job.progress.say(f"  note: the card is stamped: {'; '.join(facts['concerns'])}")
    if licence == UNKNOWN:
        job.progress.say("  note: the card says licence: unknown; name it with --licence before you pass it on")
    if repository:
        job.progress.say(f"pushed to {push(to, repository, private=not public)} ({'public' if public else 'private'})")


def rated_by_split(job: Job) -> dict[str, list[dict[str, Any]]]:
    """The run's rated responses, each with the speech that it answers, by the side that their pairs are on."""
    said, rated = rated_speeches(job)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for speech_id, responses in sorted(rated.items()):
        speech = said[speech_id]
        shown = {name: speech.get(name) for name in ("question", "history")}
        found[split_of(speech, job.config.pairs, job.config.seed)] += [row | shown for row in responses]
    return found


def check(run: Run, to: str, licence: str, repository: str | None, anyway: bool = False) -> None:
    """Look for what stands in the way of an export.

    Raises:
        BadInput: as `export`.
    """
    if not run.is_done("pair"):
        raise BadInput(f"stage pair is not done in {run.root}; run it first")
    if repository and licence == UNKNOWN:
        raise BadInput("--push needs --licence, an SPDX id such as cc-by-nc-4.0; only you know what the sources allow")
    if repository and storage.is_remote(to):
        raise BadInput(f"--push sends a local folder and --to is {to}; give a local one")
    found = run_concerns(run)[1]
    if found and not anyway:
        raise BadInput(
            f"the pairs of {run.root} should not be passed on: {'; '.join(found)}; put that right and run again, or "
            "give --anyway, and the card says so first"
        )
    check_target(to)


def run_concerns(run: Run) -> tuple[dict[str, Any], list[str]]:
    """What the manifests say of the data's quality, and what is wrong with it by the default limits: those of the run
    may have been raised to get through."""
    facts, limits = quality_facts({name: run.manifest(name) or {} for name in _MADE}), QualityConfig()
    return facts, concerns(facts, limits.max_left_out_share, limits.max_floored_share)


def plan(
    run: Run, to: str, licence: str = UNKNOWN, repository: str | None = None, public: bool = False,
    rows_per_shard: int = 50_000, what: Sequence[str] = FORMS, anyway: bool = False,
) -> list[str]:  # fmt: skip
    """What `export` would write and where, in lines; nothing is written or sent.

    Raises:
        BadInput: as `export`.
    """
    check(run, to, licence, repository, anyway)
    counts = count_pairs(run.path("preferences"))
    shards = _told({split: -(-count // rows_per_shard) for split, count in counts.items()})
    lines = [
        f"{_told(counts)} pairs of {run.root} -> {to}",
        f"  data/, as text, and conversational/, as messages: {shards} Parquet files each",
        *(
            [f"  {', '.join(others)}: the same as --what names them"]
            if (others := [f for f in what if f != "pairs"])
            else []
        ),
        f"  README.md: the card, licence {licence}",
    ]
    if repository:
        lines.append(f"then all of it to {repository} on the hub ({'public' if public else 'private'})")
    return [*lines, "Nothing was written or sent."]


def forms_of(what: str) -> tuple[str, ...]:
    """The forms that `--what` names.

    Raises:
        BadInput: one of them is none, or it names nothing.
    """
    named = [form.strip() for form in what.split(",") if form.strip()]
    unknown = [form for form in named if form not in FORMS]
    if unknown or not named:
        raise BadInput(f"--what {what} names no form {', '.join(unknown)}; give some of {','.join(FORMS)}")
    return tuple(form for form in FORMS if form in named)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in counts.items())


def card_facts(job: Job, licence: str, source: str | None) -> dict[str, Any]:
    """What the card says of the run, from its configuration and its manifests."""
    config = job.config
    pair, prepare = (job.run.manifest(name) or {} for name in ("pair", "prepare"))
    audit = json.loads(storage.read_text(job.run.path("preferences", "audit.json")) or "{}")
    imported = starts_from_pairs(config)
    nano = config.speeches.source == "nano" and not imported
    speeches = "made by the nano grammar of psycho" if nano else Path(config.speeches.source).name
    if imported:
        speeches = f"those of {Path(config.pairs.source or '').name}, imported"
    quality, found = run_concerns(job.run)
    wins = [win for split in audit.values() for win in split["wins"]]
    return {
        "name": config.name,
        "licence": licence,
        "sources": source or speeches,
        "judge": judge_name(config),
        "models": sorted({win[side] for win in wins for side in ("chosen", "rejected")}),
        "pairs": config.pairs.model_dump(mode="json"),
        "audit": audit,
        "left_out": pair.get("left_out", {}),
        "personal_data": prepare.get("personal_data"),
        "languages": {"en": 1} if nano else prepare.get("languages"),
        "nano": nano,
        "quality": quality,
        "concerns": found,
        "fluency_floor": None if imported else config.judge.fluency_floor,
    }


def judge_name(config: Config) -> str:
    """The judge that labelled, as a card or a sheet names it."""
    if starts_from_pairs(config):
        return "that of the imported set"
    return ", ".join(Path(member.model).name for member in config.judge.members())


def command(
    to: Annotated[str, typer.Option(help="folder of the data set: a path or an s3:// or gs:// URI")],
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Overrides = None,
    run_dir: RunDir = None,
    licence: Annotated[str, typer.Option(help="SPDX id for the card, such as cc-by-nc-4.0")] = UNKNOWN,
    source: Annotated[str | None, typer.Option(help="where the client speeches come from, for the card")] = None,
    push: Annotated[str | None, typer.Option(help="also send it to this data set of the hub (owner/name)")] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: for everybody to see")] = False,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="rows in a Parquet file")] = 50_000,
    what: Annotated[str, typer.Option(help="forms to write, with commas between")] = ",".join(FORMS),
    anyway: Annotated[bool, typer.Option("--anyway", help="write what should not be passed on, and stamp it")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be written, and touch nothing")] = False,
) -> None:
    """the run's pairs and responses as a data set with a card, and with --push on the hub"""

    def recipe(job: Job) -> None:
        export(job, to, licence, source, push, public, rows_per_shard, forms_of(what), anyway)

    def planned(config: Config, name: str, console: Console) -> None:
        for line in plan(Run(config, STAGES), to, licence, push, public, rows_per_shard, forms_of(what), anyway):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    raise typer.Exit(execute("export", recipe, Options(config, tuple(set_ or ()), run_dir, dry_run), planned))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
    app.command()(command)
    app()
