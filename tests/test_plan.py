"""The plan of a job: its numbers for a model whose size is counted by hand."""

from types import SimpleNamespace
from typing import Any

import learning
import pytest
from transformers import PreTrainedModel

from engine import stages
from engine.config import Config
from engine.model import build
from engine.placement import Seat, seat
from engine.plan import describe, memory, overview

# Qwen3 shape: hidden 16, 2 layers, 2 heads of 8, 1 key-value head, feed-forward 24, vocabulary 11, tied.
# A layer: q 16x16, k and v 16x8 each, o 16x16, norms of q and k 8 each, feed-forward 3 x 16x24, two norms of 16.
LAYER = 256 + 128 + 128 + 256 + 8 + 8 + 3 * 384 + 32
PARAMETERS = 11 * 16 + 2 * LAYER + 16


def job(*overrides: str, ranks: int = 1) -> tuple[Config, Seat, PreTrainedModel]:
    config = learning.configure(*overrides, dtype="float32")
    place = seat(config, {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)})
    return config, place, build(config.model, vocab_size=11, eos_id=1, pad_id=0, seed=0)


def rows(*overrides: str, ranks: int = 1) -> dict[str, str]:
    text = f"{'a' * 100}\n{'b' * 100}"
    prompts: Any = SimpleNamespace(held_out=lambda: [None] * 6, prompt=lambda *_: SimpleNamespace(text=text))
    text = describe(*job(*overrides, ranks=ranks), prompts)
    return {name.strip(): row.strip() for name, row in (line.split("  ", 1) for line in text.splitlines())}


def test_numbers_of_the_plan() -> None:
    plan = rows("run.max_staleness=3", "learner.updates_per_step=2", "generator.slots=5")
    assert plan["roles"] == "1 learner rank(s), 1 generator(s) of 5 slots"
    assert plan["model"] == f"made here: {PARAMETERS:,} parameters, Qwen3ForCausalLM, context 32"
    assert plan["domains"] == "d 1, static; 6 held-out prompts x 4"
    assert plan["rewards"] == "d by exact"
    assert plan["a step"] == "2 groups x 4 = 8 completions, at most 64 answer tokens, 2 update(s)"
    assert plan["steps"] == "10, 20 groups"
    assert plan["a prompt of d"] == f"'{'a' * 79} ... {'b' * 79}'"
    assert plan["tickets"] == "(max_staleness 3 + 1) x 2 = 8 groups at once"


def test_stages_are_told_in_one_line() -> None:
    two = "stages=[{ name = 'short', run = { steps = 3000 } }, { name = 'long' }]"
    line = overview(stages.configs(learning.configure(two)))
    assert line == "2 stages, each from the weights of the one before; steps: 1-short 3,000, 2-long 10"


def test_the_method_is_told_without_what_does_nothing() -> None:
    assert rows()["method"] == "group_norm, reinforce, token_mean"
    plan = rows(
        "algorithm.loss={ name = 'ppo_clip', low = 0.2, high = 0.28 }",
        "algorithm.correction={ name = 'tis', cap = 2.0 }",
        "algorithm.penalties=[{ name = 'overlong', limit = 8, buffer = 2 }]",
        "algorithm.kl={ name = 'k3', coefficient = 0.04 }",
        "algorithm.imitation=0.1",
        "algorithm.overlong_filter=true",
    )
    assert plan["method"] == (
        "group_norm, overlong (limit 8, buffer 2), tis (cap 2.0), ppo_clip (low 0.2, high 0.28), token_mean, "
        "k3 (coefficient 0.04), imitation 0.1, overlong_filter"
    )


def test_what_is_drawn_sampled_and_how_fast_is_learned() -> None:
    plan = rows("learner.schedule=cosine", "learner.lr_end=1e-3", "learner.warmup_steps=5", "generator.temperature=0.6")
    assert plan["drawn"] == "all prompts; uniform groups are filtered"
    assert plan["answers"] == "at most 8 tokens, temperature 0.6"
    assert plan["rate"] == "0.01, cosine to 0.001 after 5 updates of warm-up"
    bounds = "curriculum.pass_rate=[0.0, 0.375]", "curriculum.columns={ difficulty = [0, 5] }"
    plan = rows(*bounds, "algorithm.filter_uniform=false", "generator.target_entropy=0.3")
    assert plan["drawn"] == "pass rate 0 to 0.375, difficulty 0 to 5; uniform groups stay"
    assert plan["answers"] == "at most 8 tokens, temperature 1 and what keeps 0.3 nats a token"


def test_what_a_critic_and_a_schedule_add() -> None:
    schedule = "schedule=[{ step = 3, run = { group_size = 8 }, generator = { temperature = 0.5 } }]"
    plan = rows("algorithm.advantage={ name = 'gae' }", "critic.pretrain_steps=5", schedule)
    assert plan["critic"] == "begins as the policy, 5 steps alone, rate 2e-06, constant"
    assert plan["from step 3"] == "run.group_size = 8, generator.temperature = 0.5"
    assert "critic" not in rows()
    shared = "algorithm.advantage={ name = 'gae' }", "critic.shared=true"
    assert rows(*shared)["critic"].startswith("a head on the policy, ")
    assert memory(*job(*shared))["learner"] == memory(*job())["learner"]
    with_critic = memory(*job("algorithm.advantage={ name = 'gae' }"))["learner"]
    assert with_critic - memory(*job())["learner"] == 4 * 4 * PARAMETERS


@pytest.mark.parametrize(
    "ranks, overrides, roles",
    [
        (3, (), "2 learner rank(s), 1 generator(s)"),
        (3, ("placement.learners=1",), "1 learner rank(s), 2 generator(s)"),
        (2, ("placement.learners=2", "generator.local=3"), "2 learner rank(s), 3 generator(s)"),
    ],
)
def test_roles(ranks: int, overrides: tuple[str, ...], roles: str) -> None:
    assert rows(*overrides, ranks=ranks)["roles"].startswith(roles)


def test_memory_of_each_role() -> None:
    activations = 32 * 16 * 2 * 34
    logits, weight_gradient = 32 * 11, 11 * 16
    cache = 2 * 2 * 1 * 8 * 5 * 32  # keys and values, layers, heads, head size, slots, context
    assert memory(*job("generator.slots=5")) == {
        "learner": 4 * (4 * PARAMETERS + activations + logits + weight_gradient),
        "generator": 4 * (2 * PARAMETERS + cache),
        "shared weights": 4 * 2 * PARAMETERS,
    }


def test_memory_follows_the_configuration() -> None:
    plain = memory(*job())
    sharded = memory(*job(ranks=3))["learner"]
    assert plain["learner"] - sharded == 4 * 4 * PARAMETERS / 2  # two learners
    plain_head = memory(*job("ops.backend=reference"))["learner"]
    assert plain_head - plain["learner"] == 4 * (2 * 32 * 11 - 11 * 16)  # three copies of the logits instead
    reference = memory(*job("algorithm.kl={ name = 'k3', coefficient = 0.1 }"))["learner"]
    assert reference - plain["learner"] == 4 * PARAMETERS
    mixed = memory(*job("learner.mixed_precision=true"))["learner"]
    assert plain["learner"] - mixed == 2 * 32 * 16 * 2 * 34
    recomputed = memory(*job("learner.activation_checkpointing=true"))["learner"]
    assert plain["learner"] - recomputed == 4 * 32 * 16 * (2 * 34 - 34 - 2 * 2)
    half = memory(*job("generator.dtype=bfloat16"))
    assert (half["generator"], half["shared weights"]) == (plain["generator"] / 2, plain["shared weights"] / 2)


def test_versions_handed_over_between_gpus_lie_on_the_learners() -> None:
    plain = memory(*job(ranks=3))
    between = memory(*job("weights.route=cuda_ipc", ranks=3))
    assert between["learner"] - plain["learner"] == plain["shared weights"] / 2  # two learners
    assert between["shared weights"] == 0
