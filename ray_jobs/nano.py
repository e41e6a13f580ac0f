"""The embedded world: its models, checked against the truth that only a made-up world has, and made anew.

psycho nano                        where the models lie, and which gates they passed
psycho nano --check                measures judge and policies on held-out combinations
psycho nano --rebuild --to DIR     makes them anew in DIR until every gate passes; nano.models=DIR then uses them
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from psycho.errors import BadInput, StageFailed
from psycho.inference.pool import WorkerPool
from psycho.job import Job, main
from psycho.judging.fitness import Gate
from psycho.nano import world
from psycho.nano.check import check, copies

_LEGEND = """truth (gold): the ratings that follow from the grammar; a principle's figure is the correlation with it
on grammar: text that the grammar could have written; corrupted: such text with words spoilt
n: responses, or pairs of them; target: the least that passes"""


def nano(job: Job) -> None:
    """Say what there is."""
    facts, root = world.facts(job.config.nano), world.models_root(job.config.nano)
    gates = [Gate(g["name"], g["value"], g["target"], g["n"]) for g in facts["gates"]]
    job.progress.console.print(gates_table(gates, "gates that the nano models passed when they were made"))
    job.progress.say(f"nano models: {root} (recipe {facts['recipe']}, seed {facts['seed']})")


def nano_check(job: Job) -> None:
    """Measure the gates of the models that the configuration names, print them.

    Raises:
        StageFailed: a gate is missed.
    """
    job.need_ray()
    root = world.models_root(job.config.nano)
    world.facts(job.config.nano)
    gates = _measure(job, {name: str(root / name) for name in world.MODELS})
    job.progress.console.print(gates_table(gates, "nano world, held-out combinations"))
    _refuse_missed(gates)


def nano_rebuild(job: Job, target: Path) -> None:
    """Make the models anew in a folder that is not there yet.

    Raises:
        BadInput: the folder is there already.
        StageFailed: a gate is missed after every extension and restart.
    """
    from psycho.nano.build import Rebuild

    target = target.expanduser().absolute()
    if target.exists():
        raise BadInput(f"{target} is there already; name another folder in --to, or remove it first")
    job.need_ray()
    started = time.monotonic()
    config = job.config
    made = Rebuild(
        target=target,
        config=config.nano,
        training=config.training,
        progress=job.progress,
        drilled=copies,
        measure=lambda folders: _measure(job, folders),
        say=job.progress.say,
    )
    gates = made.run()
    job.progress.console.print(gates_table(gates, "nano world, held-out combinations"))
    seconds = time.monotonic() - started
    job.progress.say(f"{len(world.MODELS)} nano models in {seconds:.0f} s; use them with --set nano.models={target}")


def _measure(job: Job, folders: dict[str, str]) -> list[Gate]:
    config = job.config
    with WorkerPool(config.inference, config.seed, verbose=job.verbose) as pool:
        gates, details = check(pool, folders, config.judge, config.generation.sampling, world.POLICIES)
    compared = details["comparisons"]
    job.progress.say(
        f"  side by side, n = {compared['n']}: verdict as the truth's {compared['agreement']:.3f}, "
        f"first place favoured by {compared['first_place_bias']:+.3f}"
    )
    return gates


def _refuse_missed(gates: Sequence[Gate]) -> None:
    missed = [gate.said for gate in gates if not gate.passed]
    if missed:
        raise StageFailed(f"{len(missed)} of {len(gates)} gates missed: {'; '.join(missed)}")


def gates_table(gates: Sequence[Gate], title: str) -> Table:
    """A row a gate."""
    heads = ("gate", "measured", "target", "n", "")
    table = Table(*heads, title=title, title_justify="left", caption=_LEGEND, caption_justify="left")
    for gate in gates:
        value = "-" if gate.value is None else f"{gate.value:.3f}"
        table.add_row(gate.name, value, f"{gate.target:.2f}", str(gate.n), "ok" if gate.passed else "MISSED")
    return table


if __name__ == "__main__":
    main("nano", nano, __doc__)
