"""The learners' loop: take, pack, step, publish; and around it what a job needs before its first and after its last
step. Every learner rank runs it alike; rank 0 alone talks to the coordinator, the generators and the user."""

import json
import shlex
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from engine import checkpoint, metrics, parallel
from engine.algorithms.method import Method, compose
from engine.blocks import Cuda
from engine.config import Config, ConfigError
from engine.credit import advantages
from engine.learner import Learner
from engine.packer import Update, pack
from engine.placement import Seat
from engine.policy import manifest_of, named_tensors
from engine.process import StopSignal, Supervisor
from engine.progress import Progress
from engine.rollouts import Rollouts
from engine.run_directory import RunDirectory
from engine.schedule import Schedule
from engine.schema import Evaluation, Group, Taken, Trained
from engine.scores import Shape, left_out, scheduled_shape
from engine.summary import records, summarise
from engine.weights import Publisher, Slots

PARITY = {False: 1e-3, True: 0.05}  # bounds of `check_parity`; True: generator or learner compute in bfloat16


class Mismatch(RuntimeError):
    """Generator and learner compute different log-probabilities under the same weights."""


class Job:
    """One learner rank's view of a running job."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        seat: Seat,
        stop: StopSignal,
        policy: PreTrainedModel,
        resume: Path | None,
    ):
        self.config, self.run, self.seat, self.stop = config, run, seat, stop
        self.lead = seat.rank == 0
        self.started = time.monotonic()
        self.method = compose(config.algorithm)
        self.schedule, self.shape = Schedule(config), scheduled_shape(config)
        self.learner = Learner(config, policy, self.method, device=seat.device, directory=run.debug)
        if resume is not None:
            checkpoint.load(resume, self.learner)
        self.segment = f"{run.name}-{parallel.of_lead([time.time_ns()])[0]:x}"
        self.progress: Progress | None = None
        self.recorder: metrics.Recorder | None = None
        self.pace = metrics.Pace()
        self.exhausted: set[str] = set()  # domains of which it was said that no prompt was left
        self.holds_out = any(domain.eval_prompts or domain.eval_path for domain in config.domains)
        with ExitStack() as opened:  # whatever fails here, a stop included: neither segment nor child outlives the job
            publisher = make_publisher(config, self.segment, self.learner.model, seat.device)
            self.publisher = opened.enter_context(closing(publisher))
            rollouts = Rollouts(config, run, seat, stop, self.segment, str(resume or ""))
            self.rollouts = opened.enter_context(closing(rollouts))
            self.rollouts.say = self.say
            self.supervisors = self.rollouts.generators
            opened.callback(self._stop_generators)
            self._start_generators()
            if self.lead:
                progress = Progress(run.name, config.run.steps, live=config.tracking.progress)
                self.progress = opened.enter_context(closing(progress))
                self.recorder = opened.enter_context(closing(metrics.Recorder(config, run.metrics, run.tensorboard)))
            self._opened = opened.pop_all()

    def _start_generators(self) -> None:
        for number in range(self.seat.num_children if self.lead else 0):
            name = f"generator-{number}"
            arguments = [*self.join_arguments, "--name", name]
            log = self.run.logs / f"{name}.log"
            gpus = self.seat.child_gpus[number : number + 1]
            start_s, threads = self.config.deadlines.start_s, self.seat.child_threads
            self.supervisors.append(Supervisor(name, "engine.actor_loop", arguments, log, threads, gpus, start_s))
            self.supervisors[-1].start()

    def _stop_generators(self) -> None:
        for supervisor in self.supervisors:
            supervisor.ask_to_stop()
        for supervisor in self.supervisors:
            supervisor.stop(1.0)

    @property
    def join_arguments(self) -> list[str]:
        """What a generator needs to join, on this host."""
        key = [] if self.config.placement.trusted else ["--key", str(self.run.key)]
        return ["--join", self.rollouts.address, *key]

    # ---- the steps of the loop ----

    def begin(self) -> None:
        """What came before is not part of the pace."""
        self.pace = metrics.Pace()
        if self.progress is not None:
            self.progress.begin(self.learner.version)

    def publish(self) -> None:
        """The weights of `learner.version` to every generator, staged while they sample. Tickets of the groups that
        made it return when all have applied it."""
        version = self.learner.version
        digest = self.publisher.publish(self.rollouts.incarnation, version, named_tensors(self.learner.model))
        self.rollouts.published(version, digest)

    def take(self) -> tuple[Taken | None, float]:
        """The next groups and the seconds waited for them; None when the job is asked to stop."""
        started = time.monotonic()
        taken = self.rollouts.take(self.config.run.groups_per_step, self.learner.version)
        return taken, time.monotonic() - started

    def end_early(self, taken: Taken) -> None:
        """There are no more prompts: what is trained is the run."""
        self.say(f"{taken.exhausted}; the run ends at version {self.learner.version} of {self.config.run.steps}")
        for evaluation in taken.state.completed_evaluations:
            self.report_evaluation(evaluation)

    def step(self, taken: Taken) -> dict[str, Any]:
        """One take becomes one version."""
        version = self.learner.version
        updates = prepare(self.schedule, self.method, self.shape, taken.groups, version)
        report = self.learner.step(updates)
        skipped = self.learner.skipped
        self.rollouts.trained(became(self.learner.version, updates, skipped, report.get("entropy")))
        trained = [update for place, update in enumerate(updates) if place not in skipped]
        num_tokens = sum(update.num_tokens - update.num_stale_tokens for update in trained)
        oldest = {"trained_staleness_max": trained_staleness(trained, version)}
        return {**report, "trained_tokens": num_tokens, **oldest, **metrics.rollouts(taken, version)}

    def record(self, taken: Taken, waited_s: float, report: dict[str, Any]) -> None:
        if self.recorder is None or self.progress is None:
            return
        pace = self.pace.step(taken.state, waited_s, report["trained_tokens"])
        record = {"kind": "step", "step": self.learner.version, **report, **pace, **self.learner.peak_memory()}
        self.recorder.record(record)
        self.progress.step(record)
        for evaluation in taken.state.completed_evaluations:
            self.report_evaluation(evaluation)
        for domain in sorted(set(taken.state.exhausted) - self.exhausted):
            self.say(f"curriculum.pass_rate: no prompt of domain {domain!r} is left; the run goes on with the others")
        self.exhausted.update(taken.state.exhausted)

    def report_evaluation(self, evaluation: Evaluation) -> None:
        if self.recorder is None or self.progress is None:
            return
        self.recorder.record(metrics.evaluation_record(evaluation, evaluation.last_version))
        scores = ", ".join(f"{name} {metrics.share(s.accuracy, s.stderr)}" for name, s in evaluation.scores.items())
        span = f"version {evaluation.first_version}"
        if evaluation.last_version != evaluation.first_version:
            span = f"versions {evaluation.first_version} to {evaluation.last_version}"
        self.progress.accuracy(f"evaluation {evaluation.name!r} at {span}: {scores}")

    def evaluate_pinned(self, name: str) -> None:
        """An evaluation of the newest version alone: nothing is published until it is done."""
        if not self.holds_out or not self.config.evaluation.before_after:
            return
        self.phase(f"evaluation {name!r}")
        evaluation = self.rollouts.evaluation(name)
        if evaluation is None:
            raise self.stop.error()
        self.report_evaluation(evaluation)

    def save(self) -> None:
        """A checkpoint of this moment, whole or not there at all; generators go on meanwhile."""

        def save_rollouts(folder: Path) -> None:
            """What the coordinator hands out now is in no checkpoint, so it is recorded before this one counts."""
            state = self.rollouts.save(str(folder), self.learner.version)
            for evaluation in state.completed_evaluations:
                self.report_evaluation(evaluation)

        checkpoint.save(self.run.path, self.config, self.learner, save_rollouts)

    def check_parity(self) -> None:
        """Generator and learner must agree on fresh tokens. Raises `Mismatch` beyond `learner.parity_bound`."""
        self.phase("parity of generator and learner")
        groups = self.rollouts.probe()
        if not groups:
            return
        verdicts = [verdict for group in groups for verdict in group.verdicts]
        if all(verdict.error for verdict in verdicts):
            reward = f"domains.{groups[0].domain}.reward"
            raise ConfigError(f"{reward}: failed on each of {len(verdicts)} completions: {verdicts[0].error}")
        config = self.config
        narrow = config.learner.mixed_precision or config.generator.dtype == "bfloat16"
        difference, bound = self.learner.mismatch(groups), config.learner.parity_bound or PARITY[narrow]
        if not difference <= bound:
            raise Mismatch(
                f"learner.parity_bound = {bound}: generator and learner differ by {difference:.3g} on average in the "
                f"log-probability of a token at version {self.learner.version}; check dtype, attention and temperature"
            )
        if self.recorder is not None:
            self.recorder.record({"kind": "parity", "step": self.learner.version, "mismatch": difference})

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)

    def phase(self, text: str) -> None:
        if self.progress is not None:
            self.progress.phase(text)

    # ---- the end ----

    def finish(self) -> None:
        """Export, summary and an orderly end of all processes."""
        state = self.rollouts.finish("the job is done")
        if self.config.checkpoint.export:
            checkpoint.export(self.learner, self.run.model, self.run.export)
        if state is not None:
            for evaluation in state.completed_evaluations:
                self.report_evaluation(evaluation)
            wall_s = time.monotonic() - self.started
            summary = summarise(records(self.run.metrics), state, wall_s)
            self.run.summary.write_text(json.dumps(summary, indent=2))
            self.show(summary)

    def show(self, summary: dict[str, Any]) -> None:
        assert self.progress is not None
        self.progress.close()
        if summary["accuracy_after"] is not None and summary["accuracy_before"] is not None:
            before, after, stderr = (summary[f"accuracy_{name}"] for name in ("before", "after", "stderr"))
            margin = "" if stderr is None else f" (± {stderr:.1%})"  # of one prompt there is none
            self.progress.say(f"held-out accuracy {before:.1%} -> {after:.1%}{margin}")
        self.progress.say(
            f"{summary['steps']} steps in {summary['wall_s']:.0f} s; {summary['trained_tokens']:,} tokens trained, "
            f"{summary['generated_tokens']:,} generated; idle {summary['learner_idle']:.0%} learner, "
            f"{summary['generator_idle']:.0%} generators: "
            f"{metrics.bottleneck(summary['learner_idle'], summary['generator_idle'])}"
        )
        for name, text in {"run": self.run.path, "model": self.run.export}.items():
            self.progress.say(f"{name:<8} {text}")
        self.progress.say(f"report   {shlex.join(['python', '-m', 'engine.report', str(self.run.path)])}")

    def close(self) -> None:
        """Ends whatever still runs, in an order that leaves nobody waiting; safe to call after any failure."""
        self._opened.close()


def make_publisher(config: Config, segment: str, model: PreTrainedModel, device: str) -> Publisher:
    """Deltas are made where few weights change, which in float32 all do, and where bytes travel: a reader in this
    host's memory takes the whole, which costs it no more."""
    few = config.generator.dtype == "bfloat16"
    abroad = config.weights.route == "auto" and not config.placement.bind.startswith("127.")
    delta = config.weights.delta and few and (abroad or config.weights.route == "tcp")
    to_gpus = config.weights.route == "cuda_ipc"
    slots = Slots(Cuda(torch.device(device)), named_tensors(model)) if to_gpus else None
    manifest = manifest_of(model, config)
    return Publisher(segment, manifest, delta=delta, directory=config.weights.directory, slots=slots)


def prepare(schedule: Schedule, method: Method, shape: Shape, groups: list[Group], version: int) -> list[Update]:
    """What the learner at `version` makes of the groups of one take."""
    config = schedule.configs[0]
    return pack(
        groups,
        advantages(method, shape, groups),
        version=version,
        max_staleness=config.run.max_staleness,
        num_ranks=parallel.num_ranks(),
        budget=config.learner.tokens_per_micro_batch,
        share_prefix=config.learner.share_prefix,
        num_updates=config.learner.updates_per_step,
        left_out=[left_out(schedule, group) for group in groups],
    )


def became(version: int, updates: list[Update], skipped: list[int], entropy: float | None) -> Trained:
    """What the coordinator hears of a take that became `version` by `updates`, all but those at `skipped`."""
    return Trained(
        version=version,
        group_ids=[group_id for update in updates for group_id in update.group_ids],
        end="failed" if len(skipped) == len(updates) else "trained",
        reason="non-finite update" if skipped else "",
        entropy=entropy,
        skipped=[group_id for place in skipped for group_id in updates[place].group_ids],
    )


def trained_staleness(updates: list[Update], version: int) -> int:
    """The largest staleness among the tokens that carry a gradient, on all ranks."""
    micros = [micro for update in updates for rank in update.micro_batches for micro in rank]
    return max((int((version - micro.version[micro.mask > 0]).max(initial=0)) for micro in micros), default=0)


def learn(job: Job) -> None:
    """Runs `job` to its last step, or until its prompts are exhausted. Raises `Stopped`, resumably, when someone asks
    it to stop."""
    config, learner = job.config, job.learner
    job.publish()
    job.check_parity()
    if learner.version == 0:
        job.evaluate_pinned("before")
        job.save()
    job.begin()
    while learner.version < config.run.steps:
        taken, waited_s = job.take()
        if taken is None:
            job.save()
            raise job.stop.error()
        if taken.exhausted:
            job.end_early(taken)
            break
        trained = time.monotonic()
        report = job.step(taken)
        published = time.monotonic()
        job.publish()
        spent = {"train_s": published - trained, "publish_s": time.monotonic() - published}
        job.record(taken, waited_s, report | spent)
        if learner.version == config.critic.pretrain_steps and learner.critic is not None:
            learner.critic.export(job.run.critic)
        if learner.version == config.run.steps:  # the last one is saved and measured below
            break
        if learner.version % config.checkpoint.every == 0:
            job.save()
        if job.holds_out and config.evaluation.every and learner.version % config.evaluation.every == 0:
            job.rollouts.evaluate(f"step {learner.version}")
    job.save()
    job.evaluate_pinned("after")
