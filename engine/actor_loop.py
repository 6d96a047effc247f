"""The generator's loop: leases in, scored groups out, new weights taken between two decode steps.

    python -m engine.actor_loop --join tcp://HOST:PORT --key FILE

joins a running job from any host and may leave at any time (Ctrl-C, or `kill -9`): its leases go to others. The
generators that a job starts by itself run the same command. `--generator.FIELD=VALUE` overrides the job's for this
generator alone: another device, another SGLang.
"""

import argparse
import os
import signal
import socket
import sys
import time
from typing import Any

import numpy as np
import torch

from engine.config import Config, ConfigError, load_text
from engine.generators.base import Generator, Sampled
from engine.generators.table import GENERATORS
from engine.keys import JoinKey
from engine.process import ProcessDied, answer_with_stacks, die_with_parent
from engine.schema import (
    SCHEMA_VERSION,
    Ack,
    Beat,
    Bye,
    Cancel,
    Failure,
    Group,
    Heartbeat,
    Hello,
    LeaseKey,
    Leases,
    Publish,
    Request,
    Result,
    Stop,
    ToGenerator,
    Welcome,
)
from engine.scorer import Scorer
from engine.stream import Link, Pump, Silence
from engine.tokenizer import decode, from_files, token_ends
from engine.weights import Intake, Subscriber, WeightsError, subscribe
from rewards.verdict import Verdict

# What may differ between generators of a job: how they compute, not what.
OWN = ("--generator.sglang.", "--generator.slots=", "--generator.device=", "--generator.gpus=", "--generator.engine=")


class Actor:
    """Moves leases through the generator and the scorer; owns no thread but the intake's, which stages weights."""

    def __init__(self, config: Config, welcome: Welcome, link: Link, name: str, key: JoinKey | None):
        self._config, self._link, self._name = config, link, name
        self._incarnation = welcome.incarnation
        self._tokenizer = from_files(welcome.files)
        self._generator: Generator = GENERATORS[config.generator.engine](config, welcome.files, self._tokenizer)
        self._scorer = Scorer(config)
        self._intake = Intake(self._subscribe(welcome, key), self._generator, self._incarnation, self._wake)
        self._held: set[LeaseKey] = set()  # until their results are sent
        self._scoring: dict[LeaseKey, Sampled] = {}
        self._unacknowledged: dict[LeaseKey, tuple[float, Result]] = {}
        self._requested = -1
        self._busy_s = self._idle_s = 0.0
        self._heard = self._spoke = time.monotonic()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK)
        self.stopped = ""  # why, once asked to stop
        self.refused = False
        self._pump = Pump({
            link.socket: lambda: None,  # drained at the top of every turn
            self._scorer.fileno(): lambda: None,
            self._wake_read: lambda: os.read(self._wake_read, 1 << 16),
        })
        self._polled = self._generator.fileno() < 0  # it advances when it is polled, and not by itself
        if not self._polled:
            self._pump.add(self._generator.fileno(), lambda: None)  # `poll` reads it
        self._handlers = {
            Leases: self._on_leases,
            Publish: self._on_publish,
            Ack: self._on_ack,
            Cancel: self._on_cancel,
            Beat: lambda message: None,
            Welcome: lambda message: None,
            Stop: self._on_stop,
        }

    def _subscribe(self, welcome: Welcome, key: JoinKey | None) -> Subscriber:
        weights = subscribe(
            self._config.weights.route,
            directory=self._config.weights.directory,
            segment=welcome.segment,
            host=welcome.host,
            address=f"{self._link.address.rpartition(':')[0]}:{welcome.weights_port}",
            timeout_s=self._config.deadlines.publish_s,
            memory=self._generator.memory,
            key=key,
            broadcast_s=self._config.deadlines.broadcast_s,
            device=self._config.generator.device,
        )
        if self._generator.manifest is not None:
            self._generator.manifest.require(weights.manifest)
        return weights

    def run(self) -> None:
        """Turns until the coordinator says stop. Raises `Silence` when it has died."""
        while not self.stopped:
            self._turn()
            self._rest()

    def _turn(self) -> None:
        self._hear()
        self._take_weights()
        started = time.monotonic()
        if self._generator.num_running or not self._polled:
            for sampled in self._generator.poll(0.0):
                self._score(sampled)
            self._busy_s += time.monotonic() - started
        self._deliver()
        self._speak()

    def _rest(self) -> None:
        """Waits for news, of which there is none needed while `poll` has something to compute."""
        running = self._generator.num_running > 0
        if self.stopped or (running and self._polled):
            return
        waited = time.monotonic()
        self._pump.wait(self._spoke + self._config.deadlines.heartbeat_s)
        waited = time.monotonic() - waited
        self._busy_s += waited if running else 0.0
        self._idle_s += 0.0 if running else waited

    def close(self) -> None:
        self._link.send(Bye())
        self._generator.close()
        self._scorer.close()
        self._intake.close()

    # ---- incoming ----

    def _hear(self) -> None:
        for message in self._link.drain():
            self._heard = time.monotonic()
            self._handlers[type(message)](message)
        silent_s = time.monotonic() - self._heard
        if silent_s > self._config.deadlines.lease_s:
            raise Silence(f"{self._name}: the coordinator has been silent for {silent_s:.0f} s")

    def _on_leases(self, message: Leases) -> None:
        for lease in message.leases:
            if message.incarnation != self._incarnation or lease.key in self._held:
                continue
            self._held.add(lease.key)
            try:
                self._generator.submit(lease)
            except ValueError as error:  # this prompt cannot be sampled; others can
                self._held.discard(lease.key)
                self._link.send(Failure(*lease.key, reason=str(error)))
        self._requested = -1

    def _on_publish(self, message: Publish) -> None:
        if message.incarnation == self._incarnation:
            self._intake.want(message.version)

    def _on_ack(self, message: Ack) -> None:
        self._unacknowledged.pop((message.kind, message.group_id, message.attempt), None)

    def _on_cancel(self, message: Cancel) -> None:
        for key in message.leases:
            self._unacknowledged.pop(key, None)
            if key not in self._held:
                continue
            self._held.discard(key)
            if self._scoring.pop(key, None) is None:
                self._generator.cancel(key)
            else:
                self._scorer.cancel(key)

    def _on_stop(self, message: Stop) -> None:
        self.stopped, self.refused = message.reason, message.refused

    # ---- weights ----

    def _take_weights(self) -> None:
        applied = self._intake.advance()
        if applied is not None:
            self._idle_s += applied.pause_s
            self._link.send(applied)
            self._spoke = 0.0  # a heartbeat at once: the counters of this version

    def _wake(self) -> None:
        os.write(self._wake_write, b".")

    # ---- rollouts ----

    def _score(self, sampled: Sampled) -> None:
        lease = sampled.lease
        if lease.key not in self._held:  # cancelled when it was as good as done
            return
        self._scoring[lease.key] = sampled
        ends = np.cumsum(sampled.lengths)
        texts = [
            decode(self._tokenizer, sampled.token_ids[end - length : end])
            for end, length in zip(ends, sampled.lengths, strict=True)
        ]
        self._scorer.submit(lease.key, lease.prompt, texts)

    def _deliver(self) -> None:
        for key, verdicts in self._scorer.poll():
            result = Result(self._group(self._scoring.pop(key), verdicts))
            self._unacknowledged[key] = (time.monotonic(), result)
            self._held.discard(key)
            self._link.send(result)

    def _group(self, sampled: Sampled, verdicts: list[Verdict]) -> Group:
        lease = sampled.lease
        return Group(
            kind=lease.kind,
            group_id=lease.group_id,
            attempt=lease.attempt,
            incarnation=self._incarnation,
            generator=self._name,
            domain=lease.prompt.domain,
            lease_version=lease.version,
            temperature=lease.sampling.temperature,
            prompt_ids=lease.prompt.token_ids,
            lengths=sampled.lengths,
            finish=sampled.finish,
            verdicts=verdicts,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            versions=sampled.versions,
            loss_mask=np.ones(len(sampled.token_ids), np.uint8),
            kv_mixed=sampled.kv_mixed,
            segment_ends=self._segment_ends(sampled, verdicts),
        )

    def _segment_ends(self, sampled: Sampled, verdicts: list[Verdict]) -> list[list[int]]:
        if not any(verdict.segments for verdict in verdicts):
            return []
        completions = np.split(sampled.token_ids, np.cumsum(sampled.lengths)[:-1])
        return [
            token_ends(self._tokenizer, token_ids, [segment.end for segment in verdict.segments])
            for token_ids, verdict in zip(completions, verdicts, strict=True)
        ]

    # ---- outgoing ----

    def _speak(self) -> None:
        """What changed at once, and all of it again with every heartbeat: a connection that broke may have lost it."""
        wanted, now = self._capacity(), time.monotonic()
        due = now - self._spoke >= self._config.deadlines.heartbeat_s
        if due or wanted != self._requested:
            self._requested = wanted
            self._link.send(Request(wanted))
        if not due:
            return
        self._spoke = now
        if self._intake.applied is not None:
            self._link.send(self._intake.applied)
        held = sorted(self._held | self._unacknowledged.keys())
        self._link.send(Heartbeat(held, self._generator.generated_tokens, self._busy_s, self._idle_s))
        for key, (sent, result) in self._unacknowledged.items():
            if now - sent > self._config.deadlines.lease_s / 2:
                self._unacknowledged[key] = (now, result)
                self._link.send(result)

    def _capacity(self) -> int:
        """Samples that the generator could start now: its free slots and a few groups that wait before them."""
        ahead = self._config.generator.ahead_groups * self._config.run.group_size
        return max(0, self._generator.num_free_slots + ahead)


def join(address: str, name: str, key: JoinKey | None, overrides: list[str]) -> tuple[Config, Welcome, Link]:
    """Says hello to the coordinator at `address` and waits for its welcome.

    Raises `Silence` where nobody answers within 30 s, `ConnectionRefusedError` where the job refuses and `ConfigError`
    for an override that is none of a generator's own.
    """
    for override in overrides:
        if not override.startswith(OWN):
            raise ConfigError(f"{override}: a generator that joins overrides {', '.join(OWN)} alone")
    link = Link(ToGenerator, connect=address, identity=name, key=key)
    link.send(Hello(SCHEMA_VERSION, name, socket.gethostname(), os.getpid()))
    message: Any = link.receive(30.0, f"{name}: joining the job at {address} {'with' if key else 'without'} a key")
    if isinstance(message, Stop):
        raise ConnectionRefusedError(f"{name}: the job at {address} refused: {message.reason}")
    return load_text(message.config, overrides), message, link


def generate(address: str, name: str, key: JoinKey | None, overrides: list[str]) -> int:
    """Joins the job at `address` and serves it to its end. The exit code: 3 where the job wants it no more, else 0."""
    config, welcome, link = join(address, name, key, overrides)
    actor = Actor(config, welcome, link, name, key)
    print(f"{name}: joined {address}, incarnation {welcome.incarnation}", flush=True)
    try:
        actor.run()
    finally:
        actor.close()
        link.close()
    print(f"{name}: {actor.stopped}", flush=True)
    return 3 if actor.refused else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A generator that joins a running job.")
    parser.add_argument("--join", required=True, metavar="ADDRESS", help="tcp://HOST:PORT, as the job prints it")
    parser.add_argument("--key", default="", metavar="FILE", help="join.key of the run; default: $LEEWAY_KEY")
    parser.add_argument("--name", default=f"{socket.gethostname()}-{os.getpid()}", help="unique within the job")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: OMP_NUM_THREADS or all cores")
    arguments, overrides = parser.parse_known_args()
    die_with_parent() if "LEEWAY_PARENT" in os.environ else None
    answer_with_stacks()
    if threads := arguments.threads or int(os.environ.get("OMP_NUM_THREADS", 0)):
        torch.set_num_threads(threads)
    for number in (signal.SIGTERM, signal.SIGINT):  # not 0, by which a supervisor knows that the job is done
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return generate(arguments.join, arguments.name, JoinKey.find(arguments.key), overrides)
    except (Silence, ConnectionRefusedError, ConfigError, ProcessDied, WeightsError) as error:
        print(f"leeway: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
