"""The frame around every job: options, configuration, Ray, and how it ends.

`python -m ray_jobs.<job> --config configs/<name>.yaml`, the same under `ray job submit`, and `psycho <job>` all come
through `main`. A person's mistake ends in one sentence and exit code 2, any other failure in one line and exit code 1;
tracebacks are in a log file that the line names, and on the terminal with --verbose.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from psycho import interrupt, secrets, storage
from psycho.cluster import quiet_libraries
from psycho.config import DEFAULT_CONFIG, Config, load_config
from psycho.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_UNFIT,
    BadInput,
    UnfitJudge,
)
from psycho.failures import cause, explain, is_plain, traceback_of, without_cells, write_log
from psycho.lease import Lease
from psycho.progress import Progress
from psycho.quality import told
from psycho.run import Run, StageResult

READERS = frozenset({"export", "serve", "show", "nano", "fetch"})
"""Jobs that write nothing into the run folder: they need no lease of it, and leave its configuration as it is."""


class Job:
    """What a recipe gets: the configuration, the run folder, progress, and Ray once somebody needs it."""

    def __init__(
        self,
        config: Config,
        run: Run,
        resources: ExitStack,
        verbose: bool = False,
        lease: Lease | None = None,
        until: tuple[str, ...] = (),
    ) -> None:
        """`until`: the stages that a pipeline goes through, at most; empty: all."""
        self.config, self.run, self.verbose = config, run, verbose
        self.until = until or tuple(run.stages)
        self.of: tuple[str, ...] = ()  # the stages that are to be run one after the other, for their numbers
        self.progress = Progress()
        self._lease = lease
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
            interrupt.renew()
            self._ray_is_up = True

    def stage(self, name: str, body: Callable[[str], StageResult]) -> None:
        """Run a stage unless it is done, and say so in a line."""
        interrupt.check()
        reason = self.run.why_not_done(name)
        done = reason is None
        place = f"stage {self.of.index(name) + 1} of {len(self.of)}: " if name in self.of else ""

        def announced(partial: str) -> StageResult:
            again = f": once more, {reason}" if self.run.manifest(name) else ""
            self.progress.say(f"{place}[bold]{name}[/bold]{again}")
            if (others := self.run.unfinished_others(name)) and not storage.exists(partial):
                self.progress.say(
                    f"  note: {name} was interrupted under other settings and begins anew; {', '.join(others)} is "
                    "removed once it is done, and gone on from if those settings come back before that"
                )
            from psycho.models import hub_commits  # here, as a dry run needs none of what it brings along

            self._still_ours()
            result = body(partial)
            self._still_ours()
            if commits := hub_commits(self.config):
                result.extra = {"commits": commits} | result.extra
            return result

        manifest = self.run.execute(name, announced)
        self.manifests[name] = manifest
        if done:
            self.progress.say(f"{place}{name}: done before, skipped")
            return
        parts = [f"{manifest['rows_out']:,} rows"]
        if manifest["quarantined"]:
            why = told(manifest.get("left_out", {}))
            parts.append(f"{manifest['quarantined']:,} left out" + (f" ({why})" if why else ""))
        if manifest["tokens"]:
            parts.append(f"{manifest['tokens']:,} tokens")
        if manifest.get("cost"):
            parts.append(f"cost {manifest['cost']:,.2f}")
        where = ", ".join(self.run.path(output) for output in self.run.stages[name].outputs)
        self.progress.say(f"  {name}: {', '.join(parts)} in {manifest['seconds']:.0f} s -> {where}")

    def _still_ours(self) -> None:
        interrupt.check()
        if self._lease:
            self._lease.check()


@dataclass(frozen=True)
class Options:
    """What a person may say on the command line."""

    config: Path = DEFAULT_CONFIG
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None
    dry_run: bool = False
    verbose: bool = False
    until: str | None = None


ConfigFile = Annotated[Path, typer.Option(help="configuration file, or the name of one that psycho brings")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="key.path=value, as often as you like; `psycho settings` lists the keys"),
]
RunDir = Annotated[str | None, typer.Option(help="run folder: a path or an s3:// or gs:// URI")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and touch nothing")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="show the logs of Ray and vLLM, and tracebacks")]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="stop after this stage, and report what is there")]
Recipe = Callable[[Job], None]
FileRecipe = Callable[[Job, str], None]
Plan = Callable[[Config, str, Console], None]


@dataclass(frozen=True)
class FileOption:
    """An option `--<name> FILE` that one job has alone: with it, the job does something else with that file."""

    name: str
    help: str


EXIT_CODES = (
    "Exit codes: 0 done, 2 bad input or configuration (one sentence), 1 failed (one line, and a log), 130 interrupted "
    "by Ctrl-C, 143 by SIGTERM; after both the same command goes on."
)
FILE_OPTIONS = {
    "judge": FileOption(
        "calibrate", "compare the judge with the human ratings in this CSV, JSON, JSONL or Parquet file"
    ),
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
        until: Until = None,
    ) -> None:
        chosen = recipe if file is None or with_file is None else lambda job: with_file(job, file)
        options = Options(config, tuple(set_ or ()), run_dir, dry_run, verbose, until)
        raise typer.Exit(execute(name, chosen, options))

    left_out = {"until"} if name != "pipeline" else set()
    if with_file is None:
        left_out.add("file")
    else:
        option = FILE_OPTIONS[name]
        declared = typer.Option(f"--{option.name}", metavar="FILE", help=option.help)
        _command.__annotations__["file"] = Annotated[str | None, declared]
    signature = inspect.signature(_command, eval_str=True)
    others = [parameter for parameter in signature.parameters.values() if parameter.name not in left_out]
    _command.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    app.command(name=name, help=(documentation or name).strip(), epilog=EXIT_CODES)(_command)


def execute(name: str, recipe: Recipe, options: Options, plan: Plan | None = None) -> int:
    """Run a recipe and return the exit code; `plan` says what it would do, where that is not the plan of stages."""
    errors = Console(stderr=True, soft_wrap=True)
    frame = _Frame(name, recipe, options, plan)
    with interrupt.remembered():
        try:
            frame.run()
        except KeyboardInterrupt:
            errors.print("interrupted; the same command goes on from here", highlight=False)
            return EXIT_TERMINATED if interrupt.last() is signal.SIGTERM else EXIT_INTERRUPTED
        except UnfitJudge as error:
            errors.print(f"stopped: {error}", style="red", highlight=False, markup=False)
            return EXIT_UNFIT
        except Exception as error:
            line, code = frame.told(error)
            errors.print(line, style="red", highlight=False, markup=False)
            return code
    return EXIT_DONE


class _Frame:
    """One call of a job: what is known of it when it fails."""

    def __init__(self, name: str, recipe: Recipe, options: Options, plan: Plan | None) -> None:
        self._name, self._recipe, self._options, self._plan = name, recipe, options, plan
        self._config: Config | None = None
        self._root: str | None = None

    def run(self) -> None:
        from psycho.plan import print_plan
        from psycho.stages import STAGES, check_config

        options = self._options
        config = self._config = load_config(options.config, options.overrides, options.run_dir)
        until = _stages_until(options.until)
        if options.dry_run:
            (self._plan or functools.partial(print_plan, until=until))(config, self._name, Console())
            return
        quiet_libraries()
        check_config(config)
        config = self._config = secrets.filled(config)
        if config.training.device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU, and say so
        run = Run(config, STAGES)
        with ExitStack() as resources:
            lease = None
            if self._name in READERS:
                run.check()
            else:
                lease = run.take()
                resources.callback(lease.release)
                run.open()
                self._root = run.root
            self._recipe(Job(config, run, resources, options.verbose, lease, until))

    def told(self, error: Exception) -> tuple[str, int]:
        """The line for a person, and the exit code; what the line leaves out goes into a log."""
        private = secrets.values(*([self._config.inference.env, self._config.training.env] if self._config else []))
        sentence = explain(error)
        kind, message = cause(error)
        line = without_cells(f"error: {sentence}" if sentence else f"failed: {kind}: {message}")
        plain = is_plain(error)
        if self._options.verbose and not (plain and sentence):
            print(traceback_of(error, private), file=sys.stderr)
        if not plain:
            log = write_log(error, self._name, self._root, private)
            line += f"; the traceback is in {log}" if log else ""
        return secrets.scrub(line, private), EXIT_BAD_INPUT if sentence else EXIT_FAILED


def _stages_until(last: str | None) -> tuple[str, ...]:
    """The stages up to this one; all without one.

    Raises:
        BadInput: there is no such stage.
    """
    from psycho.stages import STAGES

    names = tuple(stage.name for stage in STAGES)
    if last is not None and last not in names:
        raise BadInput(f"--until {last}: there is no such stage; the stages are {', '.join(names)}")
    return names if last is None else names[: names.index(last) + 1]


def main(name: str, recipe: Recipe, documentation: str | None, with_file: FileRecipe | None = None) -> None:
    """Entry point of `python -m ray_jobs.<name>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    register(app, name, recipe, documentation, with_file)
    app()
