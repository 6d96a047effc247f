"""A run made by hand, by a learner with a tap and no other process, replayed to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine import tokenizer
from engine.algorithms.method import compose
from engine.config import Config, parse, to_toml
from engine.history import lineage
from engine.learner import Learner
from engine.learner_loop import prepare
from engine.model import build, describe
from engine.placement import seat
from engine.replay import Replay, digest, main, replay
from engine.run_directory import RunDirectory
from engine.schedule import Schedule
from engine.schema import Ack, Began, Group, Published, Result, Saved, Trained
from engine.scores import shape_by
from engine.stream import Tap, read_tap
from engine.wire import encode
from rewards.verdict import Verdict

CONFIG = parse(
    {
        "run": {"name": "t", "steps": 4, "groups_per_step": 2, "group_size": 3},
        "model": {
            "context": 16,
            "tokenizer": {"alphabet": "0123456789="},
            "init": {
                "model_type": "qwen3",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "tie_word_embeddings": True,
            },
        },
        "domains": [{"name": "d", "source": "callable"}],
        "generator": {"max_new_tokens": 6},
        "learner": {"tokens_per_micro_batch": 32, "lr": 0.01, "schedule": "linear", "threads": 1},
    }
)


def group(number: int, incarnation: int) -> Group:
    rng = np.random.default_rng(number)
    lengths = rng.integers(2, 7, 3).tolist()
    total = sum(lengths)
    return Group(
        kind="train",
        group_id=number,
        attempt=1,
        incarnation=incarnation,
        generator="g",
        domain="d",
        lease_version=number // 2,
        temperature=1.0,
        prompt_ids=rng.integers(2, 12, 4).astype(np.int32),
        lengths=lengths,
        finish=["stop"] * 3,
        verdicts=[Verdict.of(float(sample)) for sample in range(3)],
        token_ids=rng.integers(2, 12, total).astype(np.int32),
        logprobs=np.full(total, -2.0, np.float32),
        versions=np.full(total, number // 2, np.int32),
        loss_mask=np.ones(total, np.uint8),
    )


class Trainer:
    """The learner of a run, and its tap."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self.learner = self.fresh(CONFIG)
        self.tap = Tap(run.stream / "0000.tap")

    def fresh(self, config: Config) -> Learner:
        tokens = tokenizer.load(config.model)
        policy = build(config.model, seed=0, **tokenizer.vocabulary(tokens))
        if not self.run.model.exists():
            policy.save_pretrained(self.run.model)
            for name, content in {**tokenizer.files(tokens), **describe(policy)}.items():
                (self.run.model / name).write_bytes(content)
        return Learner(config, policy, compose(config.algorithm), device="cpu", directory=self.run.debug)

    def record(self, record: Any) -> None:
        self.tap.append(encode(record))

    def begin(self, config: Config, incarnation: int, snapshot: str) -> None:
        self.config, self.incarnation = config, incarnation
        self.record(Began(incarnation, self.learner.version, snapshot, to_toml(config)))
        self.publish()

    def publish(self) -> None:
        self.record(Published(self.learner.version, digest(self.learner, self.config)))

    def step(self) -> None:
        version = self.learner.version
        groups = [group(2 * version + place, self.incarnation) for place in range(2)]
        for each in groups:
            self.record(Result(each))
            self.record(Ack("train", each.group_id, 1))
        config = self.config
        how = Schedule(config), compose(config.algorithm), shape_by(config.algorithm)
        self.learner.step(prepare(*how, groups, version))
        self.record(Trained(version + 1, [each.group_id for each in groups], "trained"))
        self.publish()

    def resume(self, config: Config, state: dict[str, Any], version: int) -> None:
        """A new incarnation, from `state` on."""
        self.tap.close()
        self.learner = self.fresh(config)
        self.learner.load(state)
        self.learner.version = self.learner.steps = self.learner.updates = version
        self.tap = Tap(self.run.stream / "0001.tap")
        self.begin(config, 1, "of version 1")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Version 1 is saved, 2 and 3 are lost, and trained anew under a longer schedule."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    trainer = Trainer(run)
    trainer.begin(CONFIG, 0, "")
    trainer.step()
    torch.save(trainer.learner.state(), tmp_path / "state")
    trainer.record(Saved(1, "of version 1"))
    trainer.step()
    trainer.step()
    longer = msgspec.structs.replace(CONFIG, run=msgspec.structs.replace(CONFIG.run, steps=8))
    run.config.write_text(to_toml(longer))
    trainer.resume(longer, torch.load(tmp_path / "state"), 1)
    trainer.step()
    trainer.step()
    trainer.tap.close()
    return run


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    records = [change(record) for record in list(read_tap(path))]
    path.unlink()
    tap = Tap(path)
    for record in records:
        tap.append(encode(record))
    tap.close()


def test_a_resumed_run_is_repeated_to_the_bit(run, capsys):
    assert replay(run, seat(CONFIG, {})) == (4, "")
    assert replay(run, seat(CONFIG, {}), num_steps=2) == (3, "")
    assert main([str(run.path)]) == 0
    assert "versions 0 to 3: equal to the bit" in capsys.readouterr().out


@pytest.mark.parametrize("tap, number", [(0, 1), (1, 2), (1, 5)])
def test_a_changed_reward_is_found_in_the_version_that_it_helped_to_make(run, capsys, tap, number):
    def tamper(record: Any) -> Any:
        if not isinstance(record, Result) or record.group.group_id != number:
            return record
        verdicts = [Verdict.of(0.25), *record.group.verdicts[1:]]
        return Result(msgspec.structs.replace(record.group, verdicts=verdicts))

    rewrite(run.stream / f"{tap:04d}.tap", tamper)
    agreeing, difference = replay(run, seat(CONFIG, {}))
    assert agreeing == number // 2 + 1
    assert difference.startswith(f"version {number // 2 + 1} differs: ")
    assert main([str(run.path)]) == 1
    assert difference in capsys.readouterr().out


def test_a_schedule_that_a_resume_changed_is_that_of_each_incarnation(run):
    def one_schedule(record: Any) -> Any:
        return msgspec.structs.replace(record, config=to_toml(CONFIG)) if isinstance(record, Began) else record

    rewrite(run.stream / "0001.tap", one_schedule)
    agreeing, difference = replay(run, seat(CONFIG, {}))
    assert agreeing == 2 and difference.startswith("version 2 differs: ")


def test_groups_that_were_never_trained_are_not_kept(run):
    tap = Tap(run.stream / "0001.tap")
    for record in (Result(group(99, 1)), Ack("train", 99, 1)):
        tap.append(encode(record))
    tap.close()
    replaying = Replay(run, seat(CONFIG, {}))
    assert [version for version, published, now in replaying.versions(lineage(run.stream))] == [0, 1, 1, 2, 3]
    assert replaying._groups == {}


def test_no_run_is_one_line_and_code_2(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
