"""The run's pairs as a data set: Parquet shards in the published schema with a card, on disk or on the hub.

    python -m ray_jobs.export --config configs/nano.yaml --to data/pairs --licence cc-by-nc-4.0
    python -m ray_jobs.export --config configs/nano.yaml --to data/pairs --licence cc-by-nc-4.0 --push owner/name
    python -m ray_jobs.export --config configs/nano.yaml --to data/pairs --dry-run

Nothing leaves the machine without --push, and what is pushed is private until you say --public.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from psycho import storage
from psycho.config import Config
from psycho.errors import BadInput
from psycho.job import DEFAULT_CONFIG, ConfigFile, Job, Options, Overrides, RunDir, execute
from psycho.preferences.export import check_target, count_pairs, export_pairs, push
from psycho.run import Run
from psycho.stages import STAGES, starts_from_pairs

UNKNOWN = "unknown"


def export(
    job: Job, to: str, licence: str = UNKNOWN, source: str | None = None, repository: str | None = None,
    public: bool = False, rows_per_shard: int = 50_000,
) -> None:  # fmt: skip
    """Write the data set to `to`, and push it where a repository is named.

    Raises:
        BadInput: the pairs are not done, the folder is not empty, or a push lacks a licence or a local folder.
    """
    check(job.run, to, licence, repository)
    facts = card_facts(job, licence, source)
    counts = export_pairs(job.run.path("preferences"), to, facts, rows_per_shard)
    job.progress.say(f"{_told(counts)} pairs -> {to}")
    if licence == UNKNOWN:
        job.progress.say("  note: the card says licence: unknown; name it with --licence before you pass it on")
    if repository:
        job.progress.say(f"pushed to {push(to, repository, private=not public)} ({'public' if public else 'private'})")


def check(run: Run, to: str, licence: str, repository: str | None) -> None:
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
    check_target(to)


def plan(
    run: Run, to: str, licence: str = UNKNOWN, repository: str | None = None, public: bool = False,
    rows_per_shard: int = 50_000,
) -> list[str]:  # fmt: skip
    """What `export` would write and where, in lines; nothing is written or sent.

    Raises:
        BadInput: as `export`.
    """
    check(run, to, licence, repository)
    counts = count_pairs(run.path("preferences"))
    shards = _told({split: -(-count // rows_per_shard) for split, count in counts.items()})
    lines = [
        f"{_told(counts)} pairs of {run.root} -> {to}",
        f"  data/, as text, and conversational/, as messages: {shards} Parquet files each",
        f"  README.md: the card, licence {licence}",
    ]
    if repository:
        lines.append(f"then all of it to {repository} on the hub ({'public' if public else 'private'})")
    return [*lines, "Nothing was written or sent."]


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
    wins = [win for split in audit.values() for win in split["wins"]]
    return {
        "name": config.name,
        "licence": licence,
        "sources": source or speeches,
        "judge": "that of the imported set" if imported else Path(config.judge.model).name,
        "models": sorted({win[side] for win in wins for side in ("chosen", "rejected")}),
        "pairs": config.pairs.model_dump(mode="json"),
        "audit": audit,
        "left_out": pair.get("left_out", {}),
        "personal_data": prepare.get("personal_data"),
        "languages": {"en": 1} if nano else prepare.get("languages"),
        "nano": nano,
    }


def command(
    to: Annotated[str, typer.Option(help="folder of the data set: a path or an s3:// or gs:// URI")],
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Overrides = None,
    run_dir: RunDir = None,
    licence: Annotated[str, typer.Option(help="SPDX id for the card, such as cc-by-nc-4.0")] = UNKNOWN,
    source: Annotated[str | None, typer.Option(help="where the client speeches come from, for the card")] = None,
    push: Annotated[str | None, typer.Option(help="also send it to this data set of the hub (owner/name)")] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: for everybody to see")] = False,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="pairs in a Parquet file")] = 50_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be written, and touch nothing")] = False,
) -> None:
    """the run's pairs as a data set with a card, and with --push on the hub"""

    def recipe(job: Job) -> None:
        export(job, to, licence, source, push, public, rows_per_shard)

    def planned(config: Config, name: str, console: Console) -> None:
        for line in plan(Run(config, STAGES), to, licence, push, public, rows_per_shard):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    raise typer.Exit(execute("export", recipe, Options(config, tuple(set_ or ()), run_dir, dry_run), planned))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
    app.command()(command)
    app()
