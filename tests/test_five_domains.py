"""Mathematics, code, instruction following, logic and function calling in one run."""

import os
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from jobs import Job

from bench.recipes.five_domains import CONFIG, DOMAINS, draw
from engine import config as configs
from rewards.explain import read
from rewards.table import resolve

REWARDS = {domain.name: (domain.reward, domain.reward_options) for domain in configs.load(CONFIG).domains}


@pytest.mark.parametrize("domain", DOMAINS)
def test_demonstrations_are_right_and_those_of_other_prompts_are_not(domain):
    reward = resolve(*REWARDS[domain])
    rows = [draw(0, index, domain=domain) for index in range(12)]

    def solved(row, completion):
        return reward(completion=completion, **{key: row[key] for key in row if key != "demonstration"}).solved

    assert all(solved(row, row["demonstration"]) for row in rows)
    others = [solved(row, other["demonstration"]) for row in rows for other in rows if row["prompt"] != other["prompt"]]
    assert sum(others) < 0.1 * len(others)
    assert not any(solved(row, "") for row in rows)


@pytest.mark.slow
def test_a_run_of_five_domains_tells_of_each(tmp_path: Path):
    """Three steps without a warm start: every domain is sampled, judged, trained and evaluated under its name."""
    small = ["--run.steps=3", "--run.groups_per_step=10", "--run.group_size=2", "--warm_start.steps=0"]
    size = ["--model.init.hidden_size=32", "--model.init.intermediate_size=64", "--model.init.num_hidden_layers=2"]
    brief = [f"--domains.{number}.eval_prompts=4" for number in range(5)] + ["--algorithm.filter_uniform=false"]
    quiet = ["--evaluation.samples=1", "--tracking.tensorboard=false", "--tracking.progress=false"]
    with Job(tmp_path / f"five-{os.getpid()}", *small, *size, *brief, *quiet, config=CONFIG) as job:
        assert job.wait() == 0, job.printed()[-4000:]
        steps, (before, after) = job.records("step"), job.records("evaluation")
        names = {name for row in steps for name in row if name.startswith(("reward/", "accuracy/", "num_invalid/"))}
        assert {f"{figure}/{domain}" for figure in ("reward", "accuracy", "num_invalid") for domain in REWARDS} <= names
        assert all(f"accuracy/{domain}" in row for domain in REWARDS for row in (before, after))
        assert sum(row["num_invalid"] for row in steps) == 0 == after["num_invalid/all"]
        ledger = sqlite3.connect(job.run.ledger)
        trained = Counter(domain for (domain,) in ledger.execute("SELECT domain FROM groups WHERE state = 'trained'"))
        assert trained.keys() == REWARDS.keys() and trained.total() == 30
        query = "SELECT group_id FROM groups WHERE domain = 'code' AND state = 'trained'"
        (group_id,) = ledger.execute(query).fetchone()
        group, completions = read(ledger, group_id)
        assert group["domain"] == "code" and len(completions) == 2
        assert all(row["evidence"] != "{}" for row in completions)
