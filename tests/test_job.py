"""Jobs as users run them: to the end, interrupted, continued, on several ranks, with processes that come and go."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import SMALL, Job
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import checkpoint, launch
from engine.audit import audit
from engine.ledger import Ledger
from engine.run_directory import RunDirectory

pytestmark = pytest.mark.slow

STOP_S = 60.0  # from Ctrl-C until no process is left: two seconds, but more where others compute on the same cores
SILENT_S = 3.0  # deadlines.lease_s where processes die
ENDLESS = (
    "--run.steps=1000000",
    "--evaluation.before_after=false",
    "--deadlines.stop_s=40",
    f"--deadlines.lease_s={SILENT_S}",
    "--domains.0.reward_options={ delay_s = 0.05 }",  # leaves the processor to those who come
)


def sound(run: RunDirectory) -> dict[str, int]:
    """The ledger's counts, which agree with an account made from the stream and the checkpoints alone."""
    report = audit(run)
    assert report.findings == []
    ledger = Ledger(run.ledger)
    counts, findings = ledger.counts(), ledger.audit()
    ledger.close()
    assert findings == []
    assert counts == report.counts
    assert counts["drawn"] == sum(number for end, number in counts.items() if end != "drawn")
    return counts


class Proxy(threading.Thread):
    """Hands the bytes of TCP connections to `port` of this host, until they are reset."""

    def __init__(self, port: int):
        super().__init__(daemon=True)
        self._target, self._pairs = port, set[tuple[socket.socket, socket.socket]]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._pairs.add((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)

    def reset(self) -> None:
        while self._pairs:
            for end in self._pairs.pop():
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # nothing more is sent
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        self._listener.close()
        self.reset()


def query(run: RunDirectory, text: str) -> list[Any]:
    database = sqlite3.connect(f"file:{run.ledger}?mode=ro", uri=True)
    try:
        return database.execute(text).fetchall()
    finally:
        database.close()


def taken_versions(run: RunDirectory) -> list[int]:
    return [version for (version,) in query(run, "SELECT version FROM takes ORDER BY version")]


# ---- to the end ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("finished")
    with Job(folder / f"finished-{os.getpid()}") as job:
        job.succeed()
        yield job


def test_summary_says_what_the_run_did(finished: Job) -> None:
    summary = json.loads(finished.run.summary.read_text())
    before, after = finished.records("evaluation")
    assert summary["accuracy_before"] == before["accuracy/all"]
    assert summary["accuracy_after"] == after["accuracy/all"]
    assert summary["accuracy_stderr"] == after["stderr/all"]
    steps = finished.records("step")
    assert summary["steps"] == len(steps) == 4
    assert summary["trained_tokens"] == sum(step["trained_tokens"] for step in steps)
    tokens = query(finished.run, "SELECT sum(length) FROM completions JOIN groups USING (group_id)")[0][0]
    assert summary["generated_tokens"] >= tokens - 16 * 8  # heartbeats tell: the last ones of a turn may be missing
    assert summary["max_trained_staleness"] == max(step["staleness_max"] for step in steps) <= 2
    assert 0 < summary["wall_s"]
    assert 0 <= summary["learner_idle"] <= 1 and 0 <= summary["generator_idle"] <= 1


def test_ledger_counts_add_up(finished: Job) -> None:
    counts = sound(finished.run)
    assert json.loads(finished.run.summary.read_text())["groups"] == counts
    assert counts["trained"] == 16 and counts["filtered"] == counts["failed"] == counts["expired"] == 0
    assert taken_versions(finished.run) == [0, 1, 2, 3]


def test_run_directory_holds_what_was_promised(finished: Job) -> None:
    run = finished.run
    for path in (run.config, run.ledger, run.metrics, run.stream, run.checkpoints, run.logs, run.summary, run.export):
        assert path.exists(), path
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-2", "step-4"]
    assert [record["step"] for record in finished.records("parity")] == [0]
    assert finished.records("parity")[0]["mismatch"] < 1e-4


def test_before_and_after_are_pinned(finished: Job) -> None:
    before, after = finished.records("evaluation")
    assert (before["name"], before["first_version"], before["last_version"]) == ("before", 0, 0)
    assert (after["name"], after["first_version"], after["last_version"]) == ("after", 4, 4)
    assert before["num_completions/all"] == after["num_completions/all"] == 16
    assert {"accuracy/digits", "accuracy/letters", "stderr/all"} <= after.keys()


def test_export_is_the_checkpointed_policy_in_plain_transformers(finished: Job, tmp_path: Path) -> None:
    dcp_to_torch_save(finished.run.checkpoints / "step-4" / "learner", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")["model"]
    exported = AutoModelForCausalLM.from_pretrained(finished.run.export)
    assert exported.config._attn_implementation != "leeway"
    kept = AutoModelForCausalLM.from_config(exported.config)
    assert set(kept.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}  # tied
    tokens = AutoTokenizer.from_pretrained(finished.run.export)("12345=", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(exported(**tokens).logits, kept(**tokens).logits)
    start = load_file(finished.run.model / "model.safetensors")
    end = load_file(finished.run.export / "model.safetensors")
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)


def test_resume_on_two_ranks_goes_on_and_trains_nothing_twice(finished: Job, tmp_path: Path) -> None:
    run = tmp_path / f"resumed-{os.getpid()}"
    shutil.copytree(finished.run.path, run)
    before = query(finished.run, "SELECT group_ids FROM takes ORDER BY version")
    with Job(run, "--run.steps=6", "--placement.learners=2", ranks=2) as job:
        summary = job.succeed()
        assert [record["step"] for record in job.records("step")] == [1, 2, 3, 4, 5, 6]
    assert summary["steps"] == 6
    first = json.loads(finished.run.summary.read_text())
    assert summary["accuracy_before"] == first["accuracy_before"]
    assert summary["trained_tokens"] == sum(record["trained_tokens"] for record in job.records("step"))
    assert summary["generated_tokens"] > first["generated_tokens"]
    begun, done = job.records("parity"), job.records("step")  # of both launches
    assert summary["wall_s"] > sum(done[last]["time"] - begun[n]["time"] for n, last in enumerate((3, 5)))
    assert taken_versions(job.run) == [0, 1, 2, 3, 4, 5]
    assert query(job.run, "SELECT group_ids FROM takes ORDER BY version")[:4] == before
    assert sound(job.run)["trained"] == 24
    assert query(job.run, "SELECT count(*) FROM incarnations") == [(2,)]
    assert len(list((job.run.checkpoints / "step-6").glob("random-*.pt"))) == 2


def test_resume_of_a_finished_run_with_another_method_is_refused(
    finished: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(SMALL), f"--resume={finished.run.path}", "--algorithm.advantage={ name = 'group_mean' }"]
    assert launch.main(arguments) == 2
    assert capsys.readouterr().err.startswith("leeway: algorithm.advantage.name = 'group_mean'")


# ---- processes that come and go --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Two learner ranks and a generator's, without an end; the tests below disturb it one after the other."""
    folder = tmp_path_factory.mktemp("running")
    options = ("--placement.learners=2", "--checkpoint.every=5", "--evaluation.every=4")
    options = (*options, "--weights.route=collective", "--placement.trusted=true")
    with Job(folder / f"running-{os.getpid()}", *ENDLESS, *options, ranks=3) as job:
        job.until(lambda: job.version >= 2, "step 2")
        yield job


def goes_on(job: Job, steps: int = 3) -> None:
    reached = job.version
    job.until(lambda: job.version >= reached + steps, f"step {reached + steps}")


def joined(job: Job) -> int:
    return int(job.records("step")[-1]["generators"])


def outsider(job: Job, name: str) -> subprocess.Popen[bytes]:
    """A generator that joins by the command that the job prints."""
    [command] = {line.split("join by ")[1] for line in job.printed().splitlines() if "join by python" in line}
    process = job.start([sys.executable, *command.split()[1:], "--name", name])
    job.until(lambda: joined(job) == 2, f"{name} among the generators")
    text = f"SELECT count(*) FROM groups WHERE generator = '{name}' AND state = 'trained'"
    job.until(lambda: query(job.run, text)[0][0], f"a trained group of {name}")
    return process


def test_ranks_have_their_roles(running: Job) -> None:
    assert len(running.pids("rank")) == 3
    assert len(running.pids("coordinator")) == len(running.pids("generator")) == joined(running) == 1


def test_evaluation_while_training_is_stamped_with_its_span(running: Job) -> None:
    evaluations = running.until(lambda: len(found := running.records("evaluation")) >= 3 and found, "three evaluations")
    assert [record["name"] for record in evaluations[:3]] == ["step 4", "step 8", "step 12"]
    for record in evaluations:
        begun = int(record["name"].removeprefix("step "))
        assert begun - 1 <= record["first_version"] <= record["last_version"] <= running.version
        assert record["num_completions/all"] == 16


def test_generator_from_outside_joins_and_leaves(running: Job) -> None:
    process = outsider(running, "guest")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    running.until(lambda: joined(running) == 1, "the guest's leaving")
    goes_on(running)


def test_generator_from_outside_dies(running: Job) -> None:
    process = outsider(running, "doomed")
    process.kill()
    process.wait()
    running.until(lambda: joined(running) == 1, "the end of its lease")
    assert query(running.run, "SELECT count(*) FROM events WHERE event = 'left' AND generator = 'doomed'") == [(1,)]
    goes_on(running)


def test_connections_that_break_lose_no_word(tmp_path: Path) -> None:
    """The only generator's connection is reset again and again; what that swallowed is said anew."""
    with Job(tmp_path / "run", "--generator.local=0", "--run.steps=8") as job:
        job.until(lambda: "join by python" in job.printed(), "the command to join by")
        command = job.printed().split("join by ")[1].splitlines()[0].split()
        place = command.index("--join") + 1
        proxy = Proxy(int(command[place].rpartition(":")[2]))
        command[place] = f"tcp://127.0.0.1:{proxy.port}"
        guest = job.start([sys.executable, *command[1:], "--name", "guest"])
        job.until(lambda: job.version > 0, "the first step")
        for _ in range(20):
            proxy.reset()
            time.sleep(0.2)
        assert job.wait() == 0, job.printed()
        guest.terminate()  # the word that the job has ended may be lost too; then it leaves after deadlines.lease_s
        guest.wait(30)
        proxy.close()
    sound(job.run)


def test_generator_child_that_dies_is_started_again(running: Job) -> None:
    [child] = running.pids("generator")
    os.kill(child, signal.SIGKILL)
    running.until(lambda: running.pids("generator") not in ([], [child]), "another child")
    running.until(lambda: running.logged("coordinator").count("generator-rank-2 joined") == 2, "its joining again")
    goes_on(running)


def test_broadcasts_go_to_whoever_is_there(running: Job) -> None:
    text = running.logged("coordinator")
    assert "to 1 generators by gloo" in text and "to 2 generators by gloo" in text


def test_learner_rank_that_dies_ends_the_job_which_can_be_resumed(running: Job) -> None:
    running.until(lambda: checkpoint.latest(running.run.path), "a checkpoint")
    os.kill(running.pids("rank")[1], signal.SIGKILL)
    assert running.wait() != 0
    running.is_gone(STOP_S, shared_memory=False)
    kept = checkpoint.latest(running.run.path)
    assert kept is not None
    step = checkpoint.read(kept).step
    with Job(running.run.path, *ENDLESS, f"--run.steps={step + 2}") as job:
        summary = job.succeed()
    assert summary["steps"] == step + 2
    assert taken_versions(job.run) == list(range(step + 2))
    assert sound(job.run)["trained"] == 4 * (step + 2)


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------


def interrupt(job: Job) -> None:
    """Ctrl-C in the job's terminal: every process is gone in time."""
    os.killpg(job.process.pid, signal.SIGINT)
    job.is_gone(STOP_S)


def interrupted(run: Path, ranks: int, steps: int) -> int:
    """The step at which a job of `run`, begun or continued, was stopped after `steps` steps at least."""
    with Job(run, *ENDLESS, ranks=ranks) as job:
        job.until(lambda: job.version >= steps, f"step {steps}")
        interrupt(job)
        assert job.wait() == (1 if ranks else 130)  # torchrun has its own code
        reached = job.version
    assert f"continue with --resume {run}" in job.printed()
    assert "Traceback" not in job.printed() or ranks
    kept = checkpoint.latest(run)
    assert kept is not None and checkpoint.read(kept).step == reached
    return reached


def test_interrupted_job_leaves_nothing_behind_and_goes_on(tmp_path: Path) -> None:
    """By itself, continued under torchrun, and then to its end."""
    run = tmp_path / f"stopped-{os.getpid()}"
    reached = interrupted(run, ranks=1, steps=interrupted(run, ranks=0, steps=3) + 1)
    with Job(run, *ENDLESS, f"--run.steps={reached + 1}") as again:
        assert again.succeed()["steps"] == reached + 1
    assert taken_versions(again.run) == list(range(reached + 1))
    assert sound(again.run)["trained"] == 4 * (reached + 1)


def test_interrupted_at_its_start(tmp_path: Path) -> None:
    with Job(tmp_path / f"early-{os.getpid()}", *ENDLESS) as job:
        job.until(lambda: job.pids("coordinator"), "the coordinator")
        interrupt(job)
        assert job.wait() == 130
    assert "Traceback" not in job.printed()


# ---- several agents, and generators that disagree --------------------------------------------------------------


@pytest.mark.multinode
def test_two_agents_are_one_job(tmp_path: Path, unused_port: int) -> None:
    run = tmp_path / f"nodes-{os.getpid()}"
    agent = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{unused_port}", "--local-addr=127.0.0.1")
    with ExitStack() as stack:
        options = ("--placement.learners=1", "--weights.route=tcp")
        first, second = (stack.enter_context(Job(run, *options, ranks=1, torchrun=agent)) for _ in range(2))
        assert first.succeed()["steps"] == 4
        assert second.wait() == 0
        second.is_gone(STOP_S)
    assert sound(first.run)["trained"] == 16
    assert query(first.run, "SELECT DISTINCT generator FROM groups") == [("generator-rank-1",)]


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_generator_that_computes_something_else_stops_the_job(tmp_path: Path) -> None:
    options = ("--generator.dtype=bfloat16", "--learner.parity_bound=1e-6")
    with Job(tmp_path / f"parity-{os.getpid()}", *options) as job:
        assert job.wait() == 1
        job.is_gone(STOP_S)
    line = job.printed().strip().splitlines()[-1]
    assert line.startswith("leeway: learner.parity_bound = 1e-06: generator and learner differ by ")
    assert "Traceback" not in job.printed()
    assert job.records("step") == [] and not job.run.summary.exists()
