"""The frame around every job: options, configuration, Ray, and how it ends.

`python -m ray_jobs.<job> --config configs/<name>.yaml`, the same under `ray job submit`, and `psycho <job>` all come
through `main`. A person's mistake ends in one sentence and exit code 2; a traceback is for our own mistakes.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from psycho import interrupt, storage
from psycho.config import Config, load_config
from psycho.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, BadInput, StageFailed
from psycho.progress import Progress
from psycho.run import Run, StageResult

_QUOTED_CELL = re.compile(  # of pyarrow, pydantic, int() and float()
    r"(\bArrow\w+: Could not convert|\binput_value=|invalid literal for \w+\(\) with base \d+:|string to float:).*"
)
DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "nano.yaml"


class Job:
    """What a recipe gets: the configuration, the run folder, progress, and Ray once somebody needs it."""

    def __init__(self, config: Config, run: Run, resources: ExitStack, verbose: bool = False) -> None:
        self.config, self.run, self.verbose = config, run, verbose
        self.progress = Progress()
        self.manifests: dict[str, dict[str, Any]] = {}
        self._resources = resources
        self._ray_is_up = False

    def need_ray(self) -> None:
        """Join or start Ray, the models that are to be fetched first; a run with nothing left to do never pays."""
        if not self._ray_is_up:
            from psycho.cluster import ray_session
            from psycho.stages import provide_models

            provide_models(self.config, self.progress.say)

            self._resources.enter_context(ray_session(self.config.cluster, self.verbose))
            self._ray_is_up = True

    def stage(self, name: str, body: Callable[[str], StageResult]) -> None:
        """Run a stage unless it is done, and say so in a line."""
        interrupt.check()
        reason = self.run.why_not_done(name)
        done = reason is None

        def announced(partial: str) -> StageResult:
            again = f": once more, {reason}" if self.run.manifest(name) else ""
            self.progress.say(f"[bold]{name}[/bold]{again}")
            if (others := self.run.unfinished_others(name)) and not storage.exists(partial):
                self.progress.say(
                    f"  note: {name} was interrupted under other settings and begins anew; {', '.join(others)} is "
                    "removed once it is done, and gone on from if those settings come back before that"
                )
            return body(partial)

        manifest = self.run.execute(name, announced)
        self.manifests[name] = manifest
        if done:
            self.progress.say(f"{name}: done before, skipped")
            return
        parts = [f"{manifest['rows_out']:,} rows"]
        if manifest["quarantined"]:
            parts.append(f"{manifest['quarantined']:,} left out")
        if manifest["tokens"]:
            parts.append(f"{manifest['tokens']:,} tokens")
        if manifest.get("cost"):
            parts.append(f"cost {manifest['cost']:,.2f}")
        where = ", ".join(self.run.path(output) for output in self.run.stages[name].outputs)
        self.progress.say(f"  {name}: {', '.join(parts)} in {manifest['seconds']:.0f} s -> {where}")


@dataclass(frozen=True)
class Options:
    """What a person may say on the command line."""

    config: Path = DEFAULT_CONFIG
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None
    dry_run: bool = False
    verbose: bool = False


ConfigFile = Annotated[Path, typer.Option(help="configuration file")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="key.path=value, as often as you like; `psycho settings` lists the keys"),
]
RunDir = Annotated[str | None, typer.Option(help="run folder: a path or an s3:// or gs:// URI")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and touch nothing")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="show the logs of Ray and vLLM")]
Recipe = Callable[[Job], None]
FileRecipe = Callable[[Job, str], None]
Plan = Callable[[Config, str, Console], None]


@dataclass(frozen=True)
class FileOption:
    """An option `--<name> FILE` that one job has alone: with it, the job does something else with that file."""

    name: str
    help: str


FILE_OPTIONS = {
    "judge": FileOption("calibrate", "compare the judge with the human ratings in this CSV, JSONL or Parquet file"),
}


def register(
    app: typer.Typer, name: str, recipe: Recipe, documentation: str | None, with_file: FileRecipe | None = None
) -> None:
    """Add one job with its options to a command line; `with_file` runs in its stead where its file option is given."""

    def _command(
        file: str | None = None,
        config: ConfigFile = DEFAULT_CONFIG,
        set_: Overrides = None,
        run_dir: RunDir = None,
        dry_run: DryRun = False,
        verbose: Verbose = False,
    ) -> None:
        chosen = recipe if file is None or with_file is None else lambda job: with_file(job, file)
        options = Options(config, tuple(set_ or ()), run_dir, dry_run, verbose)
        raise typer.Exit(execute(name, chosen, options))

    if with_file is None:  # this job has no such option
        signature = inspect.signature(_command, eval_str=True)
        others = [parameter for parameter in signature.parameters.values() if parameter.name != "file"]
        _command.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    else:
        option = FILE_OPTIONS[name]
        declared = typer.Option(f"--{option.name}", metavar="FILE", help=option.help)
        _command.__annotations__["file"] = Annotated[str | None, declared]
    app.command(name=name, help=(documentation or name).strip())(_command)


def execute(name: str, recipe: Recipe, options: Options, plan: Plan | None = None) -> int:
    """Run a recipe and return the exit code; `plan` says what it would do, where that is not the plan of stages."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        with interrupt.remembered():
            _run(name, recipe, options, plan)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on from here", highlight=False)
        return EXIT_INTERRUPTED
    except Exception as error:
        sentence = explain(error)
        if sentence:
            errors.print(f"error: {sentence}", style="red", highlight=False, markup=False)
            return EXIT_BAD_INPUT
        if options.verbose or not isinstance(error, StageFailed):
            print(without_cells("".join(traceback.format_exception(error))), file=sys.stderr)
        errors.print(
            without_cells(f"failed: {type(error).__name__}: {_first_line(error)}"),
            style="red",
            highlight=False,
            markup=False,
        )
        return EXIT_FAILED
    return EXIT_DONE


def without_cells(text: str) -> str:
    """An error's text without the values that libraries quote in it: a client may have written them."""
    return _QUOTED_CELL.sub(r"\1 (what it quotes is not shown)", text)


def explain(error: BaseException) -> str | None:
    """The sentence for an error that the user can put right, wherever in the chain (or a Ray worker) it began."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        # An error that Ray carries over is of both types; its `cause` is the bare one, without the traceback.
        inner = getattr(current, "cause", None)
        sentence = None if isinstance(inner, BaseException) else _sentence(current)
        if sentence:
            return sentence
        context = None if current.__suppress_context__ else current.__context__
        waiting += [inner if isinstance(inner, BaseException) else None, current.__cause__, context]
    return None


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, BadInput):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and give the same command again"
    if "No space left on device" in str(error):
        return "the disk is full; free some space and give the same command again"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "the port is in use; choose another with --set serving.port=..."
    return None


def _run(name: str, recipe: Recipe, options: Options, plan: Plan | None) -> None:
    from psycho.plan import print_plan
    from psycho.stages import STAGES

    config = load_config(options.config, options.overrides, options.run_dir)
    if options.dry_run:
        (plan or print_plan)(config, name, Console())
        return
    from psycho.stages import check_config

    check_config(config)
    if config.training.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU, and say so
    run = Run(config, STAGES)
    run.open()
    with ExitStack() as resources:
        recipe(Job(config, run, resources, options.verbose))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def main(name: str, recipe: Recipe, documentation: str | None, with_file: FileRecipe | None = None) -> None:
    """Entry point of `python -m ray_jobs.<name>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    register(app, name, recipe, documentation, with_file)
    app()
