"""The loop of online DPO: one rank of it; rank 0 also drives the engines.

A round: samples (from disk, from the thread that drew them while the last round trained, or drawn now), training, the
new weights into the engines, the proof that they are there. With `online.staleness` 1 the samples of round r are drawn
by the policy that round r - 1 started from. The reference is the policy in training where a round starts, or fixed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from psycho import storage
from psycho.config import Config, TrainingConfig
from psycho.errors import BadInput, StageFailed, WaitTimedOut
from psycho.inference.requests import prompt
from psycho.schema import stable_seed
from psycho.training import states
from psycho.training.launch import read_rows
from psycho.training.loop import Trainer, setup_worker, write_history, write_notes
from psycho.training.online import heldout, proof, watch
from psycho.training.online.clock import Clock
from psycho.training.online.pairing import round_speeches
from psycho.training.online.ranks import meet, on_first
from psycho.training.online.reference import FixedReference
from psycho.training.online.rollout import Rollout, Sampled, Speech
from psycho.training.online.state import RoundStore, load_optimizer, save_optimizer
from psycho.training.online.transport import DiskTransport, transport
from psycho.training.online.turns import Turns
from psycho.training.online.unpaired import why_no_pair

Row = dict[str, Any]
# Nats of a token: in fp32 on a CPU; on a GPU, where vLLM's attention takes the TF32 units; in 16 bits.
_EXACT, _TF32, _ROUNDED = 1e-4, 0.02, 0.5


@dataclass(frozen=True)
class OnlineJob:
    """What every rank is given. `work` holds the rounds, `output` is the finished model; both are shared folders."""

    config: Config
    training: TrainingConfig
    policy: str
    work: str
    output: str
    speeches: Sequence[Speech]
    dev: Sequence[Speech]
    rollout: Rollout


def online_worker(config: dict[str, Any]) -> None:
    """One rank; `config["job"]` is an `OnlineJob`."""
    job: OnlineJob = config["job"]
    setup_worker(job.training)
    rounds = Rounds(job)
    rounds.run()
    rounds.trainer.close()


class Rounds:
    """All rounds of a job, from the last half that is on disk."""

    def __init__(self, job: OnlineJob) -> None:
        self.job, self.online, self.seed = job, job.config.online, job.config.seed
        self.store, self.clock = RoundStore(job.work), Clock()
        self.notes: list[str] = []
        meet(job.training.collective_timeout_s)
        self.turns = Turns(job.config, job.rollout.engines)
        self.done = on_first("going on", self._resume)
        with self.clock("start"):
            policy = self.store.policy(self.done, job.policy)
            self._make_room(policy)
            self.trainer = Trainer("dpo", policy, self.online, job.training, self.seed)
            before, self.shards = self.store.training(self.done), on_first("going on", self._shards)
            # The round after which the weights were loaded that adapters are added to.
            self.base = self.done
            if self.done and before["shards"] == self.shards:
                load_optimizer(self.trainer.engine, policy)
                self.base = before["base"]
            elif self.done:
                self.notes.append(
                    f"the optimizer started anew after round {self.done}, for its state is that of other workers or of "
                    "another ZeRO stage"
                )
            self.fixed = self._fixed_reference()
            self.transport = transport(job.config, self.trainer, job.rollout.engines, policy)
        tokenizer = copy.deepcopy(self.trainer.tokenizer)  # one that the thread of samples has for itself
        system = job.config.generation.system_prompt
        speeches = [*job.speeches, *job.dev]
        longest = min(job.training.max_length, job.config.inference.engine.max_model_len or job.training.max_length)
        self.probes = proof.probes(speeches, system, tokenizer, self.online.probes, longest)
        self.read: proof.Read | None = None
        self.tokenizer = tokenizer
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self.ahead: Future[None] | None = None
        self.answers: list[Row] = []

    def run(self) -> None:
        """Train the rounds that are left and write the model."""
        with self.clock("start"):
            policy = self.store.policy(self.done, self.job.policy)
            self.turns.wake()  # they are asleep where the trainer was to start beside them
            on_first("starting the engines", lambda: self.job.rollout.engines.wait(policy))
        facts = self._settle(self.done)
        on_first("writing", lambda: self._note(facts))
        for number in range(self.done, self.online.rounds):
            if on_first("watching", partial(self._stops, number)):
                break
            self._round(number)
        on_first("writing the model", self._publish)

    def _round(self, number: int) -> None:
        on_first(f"round {number + 1}", lambda: self._draw(number))
        if dist.get_rank() == 0 and self.online.staleness and number + 1 < self.online.rounds:
            self.ahead = self.threads.submit(self._sampled, number + 1, Clock())
        with self.clock("sync"):
            self.turns.rest()
        with self.clock("training"):
            report = self._train(number)
        self._save(number + 1, report)
        if self.online.staleness:
            with self.clock("waiting"):
                on_first(f"round {number + 2}", lambda: self._join(number + 1))
        with self.clock("sync"):
            self._send(number + 1)
        facts = self._settle(number + 1) | self.turns.facts()
        on_first("writing", lambda: self._finish(number + 1, facts))
        self.clock = Clock()

    def _make_room(self, policy: str) -> None:
        """Engines that share their GPUs with the trainer are up and asleep, also those that an earlier try lost."""
        if self.online.placement == "colocate":
            self.turns.wake()
            on_first("starting the engines", lambda: self.job.rollout.engines.wait(policy))
            self.turns.rest()

    def _shards(self) -> Row:
        """What DeepSpeed's own state of the optimizer fits."""
        training = self.job.training
        names = ("zero_stage", "offload_optimizer", "offload_parameters", "precision")
        adam = type(states.adam(self.trainer.engine)).__name__
        return {"world": self.trainer.world, "adam": adam} | {name: getattr(training, name) for name in names}

    def _note(self, facts: Row) -> None:
        """What was found at the start, where an earlier try did not come to note it."""
        if not self.store.after(self.done):
            self.store.keep_after(self.done, facts)
        self._tell(self.done, facts)

    def _tell(self, index: int, facts: Row) -> None:
        line = watch.said(index, facts)
        if line and self.job.rollout.reporter:
            self.job.rollout.reporter.add(0, 0, line)

    def _resume(self) -> int:
        self.store.tidy()
        return self.store.trained()

    def _fixed_reference(self) -> FixedReference | None:
        if self.online.reference != "fixed" or not self.trainer.objective.needs_reference:
            return None
        return FixedReference(self.trainer, self.job.policy, storage.join(self.job.work, "references"))

    def _draw(self, number: int) -> None:
        """Have the samples of a round, within the limit."""
        self.ahead = self.threads.submit(self._sampled, number, self.clock)
        self._join(number)

    def _sampled(self, number: int, clock: Clock) -> None:
        """The first half of a round, unless it is on disk; rank 0 alone."""
        if self.store.has_sampled(number):
            return
        index = max(0, number - self.online.staleness)
        policy = self.store.policy(index, self.job.policy)
        chosen = round_speeches(self.job.speeches, self.online, self.seed, number)
        sampled = self.job.rollout(policy, number, chosen, clock, self.store.sampling(number))
        with clock("watch"):
            sampled.report |= {"policy": index} | self._divergence(policy, chosen, sampled)
        self.store.keep_sampled(number, sampled)

    def _divergence(self, policy: str, speeches: Sequence[Speech], sampled: Sampled) -> dict[str, float]:
        """By the first sample of each of the first speeches, as many as asked for, unless it was cut off: to its tokens
        an end is added that the policy never said."""
        count, system = self.online.kl_samples, self.job.config.generation.system_prompt
        first = sampled.samples[:: self.online.samples_per_speech]
        rows = list(zip(speeches, first, strict=True))[:count]
        texts = [
            (prompt(speech, system), row["response"])
            for speech, row in rows
            if row["response"] and not row["truncated"]
        ]
        pool = self.job.rollout.engines.rollout
        return watch.divergence(pool, self.tokenizer, policy, self.job.policy, texts) if texts else {}

    def _train(self, number: int) -> Row:
        """Train on a round's pairs; the report of it."""
        trainer, job = self.trainer, self.job
        # Read by one for all: what it wrote a moment ago, others may not see yet on a file system over the network.
        pairs = on_first("reading pairs", lambda: read_rows(self.store.pairs(number)))
        if not pairs:
            raise BadInput(on_first("reading samples", lambda: self._no_pair(number)))
        groups, too_long = trainer.groups(pairs)
        if not groups:
            limit = job.training.max_length
            raise BadInput(f"every pair of round {number + 1} is over training.max_length {limit}; raise it")
        if self.fixed:
            self.fixed.store(groups)

        def on_step(rows: int, tokens: int, statistics: dict[str, float]) -> None:
            if job.rollout.reporter and trainer.rank == 0:
                job.rollout.reporter.add(rows, tokens, f"round {number + 1} loss {statistics['loss']:.3f}")

        torch.manual_seed(stable_seed("round", self.seed, number, trainer.rank))  # the same whenever it starts
        references = self.fixed.folder if self.fixed else None
        # A checkpoint holds adapters whole, which must not be added to a policy that some of them are merged into.
        steps = storage.join(job.work, f"steps-{self.base}" if job.training.lora else "steps")
        history = trainer.fit(groups, self.seed + number, on_step, references=references, checkpoints=steps)
        return {"too_long": len(too_long), "history": [row | {"round": number} for row in history]}

    def _no_pair(self, number: int) -> str:
        return f"round {number + 1} made no pair: {why_no_pair(self.store.samples(number).to_pylist(), self.online)}"

    def _save(self, index: int, report: Row) -> None:
        """The second half of a round; collective."""
        folder = on_first("writing", lambda: self.store.aside(f"trained-{index}"))
        # Where the engines read the folder, writing it is half of the way there.
        with self.clock("sync" if isinstance(self.transport, DiskTransport) else "checkpoint"):
            self.trainer.save(storage.join(folder, "policy"))
        with self.clock("checkpoint"):
            save_optimizer(self.trainer.engine, folder)
            dist.barrier()
            report |= {"shards": self.shards, "base": self.base}
            on_first("writing", lambda: self.store.keep_trained(index, folder, report))

    def _send(self, index: int) -> None:
        """The weights in training to the engines, which wake for it where they slept; collective."""
        before, policy = (self.store.policy(place, self.job.policy) for place in (index - 1, index))
        self.turns.wake_weights()
        self.transport.send(policy, before)
        self.turns.wake()

    def _join(self, number: int) -> None:
        waiting, self.ahead = self.ahead, None
        if waiting:
            if not wait([waiting], self.online.round_timeout_s).done:
                limit = self.online.round_timeout_s
                raise WaitTimedOut(f"the samples of round {number + 1}", limit, "online.round_timeout_s")
            waiting.result()

    def _settle(self, index: int) -> Row:
        """The engines hold the policy after `index` rounds, which is proven, and its dev score; collective."""
        policy = self.store.policy(index, self.job.policy)
        with self.clock("sync"):
            said = proof.trainer_logprobs(self.trainer, self.probes)
            error = on_first(f"weights after {index} rounds", lambda: self._prove(index, policy, said))
        with self.clock("watch"):
            score = on_first("dev score", lambda: self._dev_score(index, policy))
        facts = {"sync_error": error, "dev_score": score, "dev_tokens": _tokens(self.answers)}
        if heldout.due(self.job.config, index):
            with self.clock("gold"):
                facts |= on_first("held-out judge", lambda: self._held_out(index, policy))
        return facts

    def _prove(self, index: int, policy: str, said: Sequence[Sequence[float]]) -> float:
        exact = (self.job.training.precision, self.job.config.inference.engine.dtype) == ("fp32", "float32")
        within = _ROUNDED if not exact else _EXACT if self.job.training.device == "cpu" else _TF32
        tolerance = self.online.sync_tolerance or within
        found = self.job.rollout.engines.rollout.read_by_each(policy, [row.ids for row in self.probes])
        try:
            sent = index > self.done and not isinstance(self.transport, DiskTransport)
            error = proof.check(said, found, tolerance, sent)
            before, self.read = self.read, proof.Read(said, found)
            # Adapters merged into 16 bits may be rounded away, which is no fault of the way there.
            if before and (exact or not self.job.training.lora):
                proof.check_moved(before, self.read)
        except StageFailed:
            self.store.doubt(index)
            raise
        return error

    def _dev_score(self, index: int, policy: str) -> float | None:
        known, self.answers = self.store.after(index).get("dev_score"), []
        if known is not None or not self.job.dev:
            return known
        self.answers = self.job.rollout.dev(policy, self.job.dev)
        return watch.mean_value(self.answers)

    def _held_out(self, index: int, policy: str) -> Row:
        """What the held-out judge says of the answers by which the dev score was taken."""
        known = self.store.after(index)
        if "gold_score" in known:
            return {name: known[name] for name in heldout.KEYS}
        rollout, dev = self.job.rollout, self.job.dev
        answers = self.answers or rollout.dev(policy, dev)  # where the dev score was taken another time
        found = heldout.opinion(rollout.engines, self.job.config, dev, answers, rollout.reporter)
        return found if self.answers else found | {"gold_tokens": found["gold_tokens"] + _tokens(answers)}

    def _stops(self, done: int) -> bool:
        return watch.stops(self._dev_scores(done), done, self.online.patience)

    def _dev_scores(self, done: int) -> dict[int, float | None]:
        return {index: self.store.after(index).get("dev_score") for index in range(done + 1)}

    def _finish(self, index: int, facts: Row) -> None:
        """Note what was found after a round, and let go of the policies that nobody will ask for."""
        self.store.keep_after(index, facts | {"seconds": self.clock.whole()})
        self._tell(index, facts)
        best = watch.best(self._dev_scores(index), index)
        self.store.forget({index, index - self.online.staleness, best})

    def _publish(self) -> None:
        trained = self.store.trained()
        scores = self._dev_scores(trained)
        chosen = watch.best(scores, trained)
        self._look_at(chosen, scores)
        reports = self.store.rounds()
        reports[chosen - 1]["chosen"] = True
        aside = storage.aside(self.job.output)
        storage.remove(aside)  # an earlier try may have come as far as this, and died after it
        storage.link_dir(self.store.policy(chosen, self.job.policy), aside)
        write_notes(aside, [*self.trainer.notes, *self.notes])
        storage.write_text(storage.join(aside, "rounds.json"), json.dumps(reports))
        write_history(aside, [row for index in range(trained) for row in self.store.training(index + 1)["history"]])
        storage.publish(aside, self.job.output)

    def _look_at(self, chosen: int, scores: dict[int, float | None]) -> None:
        """Say where the policy that is kept is none to be glad of, and what the held-out judge thinks of it."""
        first, score = scores[0], scores[chosen]
        if first is not None and score is not None and score <= first:
            self.notes.append(
                f"no round was better by the dev score than the policy before the first ({score:.3f} after round "
                f"{chosen}, {first:.3f} before); compare the two before this one is used"
            )
        known = self.store.after(chosen)
        if self.online.gold_every and "gold_score" not in known:
            self.answers = []
            self.store.keep_after(chosen, known | self._held_out(chosen, self.store.policy(chosen, self.job.policy)))


def _tokens(answers: Sequence[Row]) -> int:
    """What drawing and rating them took."""
    return sum(row["output_tokens"] + row["judge_tokens"] for row in answers)
