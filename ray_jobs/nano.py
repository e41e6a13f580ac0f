"""The embedded world: make its models, and check them against the truth that only a made-up world has.

psycho nano            makes the models unless they are cached
psycho nano --check    measures judge and generators on held-out combinations, against the gates
"""

from __future__ import annotations

import time

from rich.table import Table

from psycho.errors import StageFailed
from psycho.inference.pool import WorkerPool
from psycho.job import Job, main
from psycho.models import uses_nano
from psycho.nano import build
from psycho.nano.check import Gate, check


def ensure_nano(job: Job) -> None:
    """Make the nano models if the configuration names them and they are not there."""
    if not uses_nano(job.config) or build.is_built(job.config.nano):
        return
    job.need_ray()
    job.progress.say("[bold]nano[/bold]: making the embedded models; they are kept for later runs")
    started = time.monotonic()
    build.build(job.config.nano, job.config.training, job.progress)
    job.progress.say(f"  nano: {len(build.MODELS)} models in {time.monotonic() - started:.0f} s")


def nano(job: Job) -> None:
    """Make the models."""
    ensure_nano(job)
    job.progress.say(f"nano models: {build.nano_folder(job.config.nano)}")


def nano_check(job: Job) -> None:
    """Make the models, measure the gates, print them.

    Raises:
        StageFailed: a gate is missed.
    """
    ensure_nano(job)
    job.need_ray()
    config = job.config
    folder = build.nano_folder(config.nano)
    folders = {name: str(folder / name) for name in build.MODELS}
    with WorkerPool(config.inference, config.seed, verbose=job.verbose) as pool:
        gates, details = check(pool, folders, config.judge, config.generation.sampling, build.POLICIES)
    job.progress.console.print(_table(gates))
    compared = details["comparisons"]
    job.progress.say(
        f"side by side, n = {compared['n']}: verdict as gold's {compared['agreement']:.3f}, "
        f"first place favoured by {compared['first_place_bias']:+.3f}"
    )
    missed = [gate.name for gate in gates if not gate.passed]
    if missed:
        raise StageFailed(f"{len(missed)} of {len(gates)} gates missed: {'; '.join(missed)}")


def _table(gates: list[Gate]) -> Table:
    table = Table("gate", "measured", "target", "n", "", title="nano world, held-out combinations")
    for gate in gates:
        value = "-" if gate.value is None else f"{gate.value:.3f}"
        table.add_row(gate.name, value, f"{gate.target:.2f}", str(gate.n), "ok" if gate.passed else "MISSED")
    return table


if __name__ == "__main__":
    main("nano", nano, __doc__)
