"""The coordinator's process: messages in, leases and groups out, around the state machine in `coordinator`."""

import argparse
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import zmq

from engine import tokenizer
from engine.config import Config, ConfigError, load, to_toml
from engine.coordinator import Coordinator
from engine.keys import Lock
from engine.ledger import Ledger
from engine.process import answer_with_stacks, die_with_parent
from engine.prompts import Prompts
from engine.run_directory import RunDirectory, description
from engine.schema import (
    SCHEMA_VERSION,
    Applied,
    Beat,
    Began,
    Bye,
    Cancel,
    Done,
    Evaluate,
    Evaluated,
    Failure,
    Finished,
    FromGenerator,
    FromLearner,
    Heartbeat,
    Hello,
    Leases,
    Probed,
    Publish,
    Published,
    Ready,
    Refused,
    Request,
    Result,
    Save,
    Saved,
    Stalled,
    Stop,
    Take,
    TapRecord,
    ToGenerator,
    Trained,
    Welcome,
)
from engine.scores import scheduled_shape
from engine.snapshot import SNAPSHOT, digest
from engine.stream import Hub, Link, Pump, Tap
from engine.weights.collective import WHOLE, Broadcaster
from engine.weights.segment import host_id
from engine.weights.tcp import Server
from engine.wire import encode

IDLE_S = 1.0  # how long to wait where the coordinator has no deadline of its own


class CoordinatorLoop:
    """One thread: drains both sockets, lets the coordinator decide, answers. At most one request of the learner is
    open at a time, since the learner waits for each answer."""

    def __init__(self, config: Config, run: RunDirectory, learner: str, segment: str, snapshot: bytes | None):
        self._config, self._run, self._segment = config, run, segment
        self._link = Link(FromLearner, connect=learner)
        self._lock = None if config.placement.trusted else Lock()
        self._hub = Hub(config.placement.bind, config.placement.port, FromGenerator, self._lock)
        self._weights = Server(segment, config.placement.bind, self._lock, broadcaster(config, segment))
        self._noted: Counter[str] = Counter()  # by event
        if self._lock is not None:
            self._lock.key.write(run.key)
        self._ledger = Ledger(run.ledger)
        self._files = {path.name: path.read_bytes() for path in description(run.model)}
        prompts = Prompts(config, tokenizer.from_files(self._files))
        shape = scheduled_shape(config)
        self._coordinator = Coordinator(config, prompts, self._ledger, shape, self._record)
        self._incarnation = self._coordinator.begin(time.monotonic(), snapshot)
        self._tap = Tap(run.stream / f"{self._incarnation:04d}.tap")
        self._record(Began(self._incarnation, self._coordinator.version, digest(snapshot), to_toml(config)))
        self._open: Take | Evaluate | None = None  # the learner's request that still waits
        self._finished = self._complaint = ""
        self._pump = Pump({self._link.socket: self._hear_learner, self._hub.socket: self._hear_generators})
        self._learner_handlers = {
            Take: self._on_take,
            Evaluate: self._on_evaluate,
            Trained: self._on_trained,
            Published: self._on_published,
            Save: self._on_save,
            Finished: self._on_finished,
        }
        self._generator_handlers = {
            Request: lambda peer, m, now: self._coordinator.request(peer, m.num_samples, now),
            Applied: lambda peer, m, now: self._coordinator.applied(peer, m, now),
            Heartbeat: self._on_heartbeat,
            Failure: lambda peer, m, now: self._hub.send(peer, self._coordinator.failure(peer, m, now)),
            Bye: lambda peer, m, now: self._coordinator.leave(peer, "left", now),
        }

    def run(self) -> None:
        self._link.send(Ready(f"tcp://{self._config.placement.bind}:{self._hub.port}", self._incarnation))
        while True:
            deadline = self._coordinator.next_deadline()
            self._pump.wait(time.monotonic() + IDLE_S if deadline is None else deadline)
            if self._finished:
                return
            now = time.monotonic()
            for line in self._coordinator.tick(now):
                print(line, flush=True)
            self._note_failures()
            self._answer(now)
            self._complain(now)
            for generator, leases in self._coordinator.grants(now).items():
                self._hub.send(generator, Leases(self._incarnation, leases))

    def close(self) -> None:
        self._tap.close()
        self._ledger.close()
        if self._lock is not None:
            self._lock.close()
            self._run.key.unlink(missing_ok=True)
        self._hub.close()
        self._link.close()
        self._weights.close()

    def _note_failures(self) -> None:
        """Notes connections without the job's key, frames that are no message, and broadcasts that broke."""
        refused = self._hub.malformed + self._weights.num_refused + (self._lock.num_refused if self._lock else 0)
        found = {"refused": (refused, "connections or messages"), "broken": (self._weights.num_broken, "broadcasts")}
        for event, (number, what) in found.items():
            if number > self._noted[event]:
                with self._ledger.transaction():
                    self._ledger.event(event, detail=f"{number - self._noted[event]} {what}")
                self._noted[event] = number

    # ---- generators ----

    def _hear_generators(self) -> None:
        if self._finished:  # in this very turn: the learner has the last counts
            return
        now = time.monotonic()
        for peer, message, frames in self._hub.drain():
            if isinstance(message, Hello):
                self._on_hello(peer, message, now)
            elif not self._coordinator.has(peer):
                self._hub.send(peer, Stop("not a member any more: join again", refused=True))
            elif isinstance(message, Result):
                self._tap.append(frames)
                self._hub.send(peer, self._coordinator.arrived(message.group, now))
            else:
                self._generator_handlers[type(message)](peer, message, now)

    def _on_hello(self, peer: str, hello: Hello, now: float) -> None:
        if hello.schema_version != SCHEMA_VERSION:
            self._hub.send(peer, Stop(f"schema version {hello.schema_version}, the job has {SCHEMA_VERSION}", True))
            return
        self._coordinator.join(peer, now)
        self._hub.send(
            peer,
            Welcome(
                schema_version=SCHEMA_VERSION,
                incarnation=self._incarnation,
                config=to_toml(self._config),
                files=self._files,
                segment=self._segment,
                host=host_id(),
                weights_port=self._weights.port,
            ),
        )
        self._remind(peer)
        print(f"{peer} joined from {hello.host}, pid {hello.pid}", flush=True)

    def _on_heartbeat(self, peer: str, beat: Heartbeat, now: float) -> None:
        over = self._coordinator.heartbeat(peer, beat, now)
        self._hub.send(peer, Beat())
        if over:
            self._hub.send(peer, Cancel(over))
        self._remind(peer)  # a broken connection may have lost it

    def _remind(self, peer: str) -> None:
        """Tells a generator of the version that it has yet to apply, if there is one."""
        version = self._coordinator.owed(peer)
        if version is not None:
            self._hub.send(peer, Publish(self._incarnation, version))

    # ---- learner ----

    def _hear_learner(self) -> None:
        now = time.monotonic()
        for message in self._link.drain():
            self._learner_handlers[type(message)](message, now)

    def _on_take(self, message: Take, now: float) -> None:
        self._record(message)
        self._open = message

    def _on_evaluate(self, message: Evaluate, now: float) -> None:
        self._coordinator.evaluate(message.name, message.kind, message.wait, now)
        if message.wait:
            self._open = message

    def _on_trained(self, message: Trained, now: float) -> None:
        self._record(message)
        self._coordinator.trained(message)

    def _on_published(self, message: Published, now: float) -> None:
        self._record(message)
        self._coordinator.published(message.version, now)
        self._to_all(Publish(self._incarnation, message.version))

    def _on_save(self, message: Save, now: float) -> None:
        state = self._coordinator.state()  # first: what it hands out a resume shall not hand out again
        snapshot = self._coordinator.snapshot(message.step)
        (Path(message.path) / SNAPSHOT).write_bytes(snapshot)
        self._record(Saved(message.step, digest(snapshot)))
        self._tap.sync()  # a checkpoint that outlives the machine is nothing without its record
        self._link.send(Done(state))

    def _on_finished(self, message: Finished, now: float) -> None:
        self._finished = message.reason
        self._coordinator.draws.tally.write(self._run.pass_rates)
        self._to_all(Stop(message.reason))
        self._link.send(Done(self._coordinator.state()))

    def _answer(self, now: float) -> None:
        """Answers the learner's open request if it can be answered now."""
        answer = None if self._open is None else self._try(self._open, now)
        if answer is not None:
            self._open = None
            self._link.send(answer)

    def _complain(self, now: float) -> None:
        """Tells the learner, whose request waits, why it does."""
        reason = "" if self._open is None else self._coordinator.stalled(now)
        if reason and reason != self._complaint:
            self._link.send(Stalled(reason))
        self._complaint = reason

    def _try(self, message: Take | Evaluate, now: float) -> Any:
        if isinstance(message, Take):
            taken = self._coordinator.take(message.num_groups, message.version, now)
            hopeless = self._coordinator.hopeless
            return Refused(hopeless) if taken is None and hopeless else taken
        if message.kind == "probe":
            groups = self._coordinator.probe(message.name)
            return None if groups is None else Probed(groups)
        evaluation = self._coordinator.evaluation(message.name)
        return None if evaluation is None else Evaluated(evaluation)

    def _to_all(self, message: ToGenerator) -> None:
        for generator in self._coordinator.members():
            self._hub.send(generator, message)

    def _record(self, record: TapRecord) -> None:
        self._tap.append(encode(record))


def broadcaster(config: Config, segment: str) -> Broadcaster | None:
    """What broadcasts the weights, where the configuration wants that."""
    if config.weights.route != "collective":
        return None
    step_s, whole_s = config.deadlines.broadcast_s, WHOLE * config.deadlines.publish_s
    return Broadcaster(segment, config.placement.bind, step_s=step_s, whole_s=whole_s, device=config.learner.device)


def main() -> int:
    parser = argparse.ArgumentParser(description="The coordinator of one job; started by its learner.")
    parser.add_argument("--run", required=True)
    parser.add_argument("--learner", required=True)
    parser.add_argument("--segment", required=True)
    parser.add_argument("--resume", default="", metavar="CHECKPOINT")
    arguments = parser.parse_args()
    die_with_parent()
    answer_with_stacks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = RunDirectory(Path(arguments.run))
    snapshot = (Path(arguments.resume) / SNAPSHOT).read_bytes() if arguments.resume else None
    try:
        loop = CoordinatorLoop(load(run.config), run, arguments.learner, arguments.segment, snapshot)
    except (ConfigError, OSError, ValueError, zmq.ZMQError) as error:
        print(f"coordinator: {error}", file=sys.stderr)
        link = Link(FromLearner, connect=arguments.learner)
        link.send(Refused(str(error)))
        link.close()
        return 2
    try:
        loop.run()
    finally:
        loop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
