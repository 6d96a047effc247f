"""The same mathematics on a GPU as on a CPU; run by bench/gpu.sh where there is one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.algorithms.method import compose
from engine.attention import Layout, attend_cuda, attend_plain
from engine.config import parse
from engine.generators.embedded import Embedded
from engine.learner import Learner
from engine.model import build
from engine.packer import pack
from engine.schema import Group, Lease, Prompt, Sampling
from rewards.verdict import Verdict

pytestmark = pytest.mark.gpu

TABLE = {
    "run": {"name": "gpu", "steps": 4, "groups_per_step": 2, "group_size": 4},
    "model": {
        "context": 64,
        "init": {
            "model_type": "qwen3",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    },
    "domains": [{"name": "d", "source": "callable"}],
    "generator": {"max_new_tokens": 16, "device": "cuda"},
    "learner": {"tokens_per_micro_batch": 256, "lr": 1e-3, "device": "cuda"},
}
VOCAB = 64


def policy():
    return build(parse(TABLE).model, vocab_size=VOCAB, eos_id=1, pad_id=0, seed=1)


@pytest.fixture
def one_rank():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_varlen_attention_is_the_reference_with_its_gradient():
    layout = Layout(np.array([0, 7, 19, 24, 40], np.int32), np.array([-1, 0, 0, -1], np.int32))
    torch.manual_seed(0)
    parts = [torch.randn(40, heads, 64, dtype=torch.float64) for heads in (4, 2, 2)]
    upstream = torch.randn(40, 4, 64, dtype=torch.float64)

    def run(attend, dtype, device):
        leaves = [part.to(device, dtype).requires_grad_() for part in parts]
        out = attend(*leaves, layout, 64**-0.5)
        out.backward(upstream.to(device, dtype))
        return [out, *(leaf.grad for leaf in leaves)]

    for ours, theirs in zip(
        run(attend_cuda, torch.bfloat16, "cuda"), run(attend_plain, torch.float64, "cpu"), strict=True
    ):
        error = (ours.double().cpu() - theirs).norm() / theirs.norm()
        assert error < 1e-2, error


def sample(model) -> list[Group]:
    config = parse(TABLE)
    generator = Embedded(
        model.cuda().requires_grad_(False), config.generator, context=64, stop_ids=[1], text=lambda ids: ""
    )
    generator.load(0, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    for number in range(2):
        prompt = Prompt("d", number, np.arange(2, 7 + number, dtype=np.int32), "", "")
        generator.submit(Lease("train", number, 0, 0, 0, 4, prompt, Sampling(1.0, 16)))
    sampled = []
    while len(sampled) < 2:
        sampled += generator.poll(0.0)
    return [
        Group(
            kind="train",
            group_id=one.lease.group_id,
            attempt=0,
            incarnation=0,
            generator="g",
            domain="d",
            lease_version=0,
            temperature=1.0,
            prompt_ids=one.lease.prompt.token_ids,
            lengths=one.lengths,
            finish=one.finish,
            verdicts=[Verdict.of(float(i % 2)) for i in range(4)],
            token_ids=one.token_ids,
            logprobs=one.logprobs,
            versions=one.versions,
            loss_mask=np.ones(len(one.token_ids), np.uint8),
        )
        for one in sampled
    ]


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo"])
def test_kernels_and_reference_take_the_same_step(one_rank, tmp_path, loss):
    groups = sample(policy())
    moved = []
    for backend in ("fused", "reference"):
        algorithm = {"loss": {"name": loss}, "kl": {"name": "k3", "coefficient": 0.1}, "entropy": 0.01}
        learner_table = {**TABLE["learner"], "eps": 1.0}  # steps in proportion to the gradient
        table = {**TABLE, "learner": learner_table, "algorithm": algorithm, "ops": {"backend": backend}}
        config = parse(table)
        learner = Learner(config, policy(), compose(config.algorithm), device="cuda", directory=tmp_path)
        report = learner.step(packed(groups))
        moved.append((report, {name: tensor.clone() for name, tensor in learner.weights()}))
    (fused, weights), (reference, expected) = moved
    assert fused == pytest.approx(reference, rel=1e-3, abs=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def packed(groups):
    return pack(
        groups,
        [np.array([1, -1, 1, -1], np.float32)] * 2,
        version=0,
        max_staleness=4,
        num_ranks=1,
        budget=256,
        share_prefix=True,
        num_updates=1,
    )


@pytest.mark.parametrize(("mixed", "bound"), [(False, 1e-4), (True, 0.05)])
def test_the_learner_agrees_with_the_generator_and_trains(one_rank, tmp_path, mixed, bound):
    config = parse({**TABLE, "learner": {**TABLE["learner"], "mixed_precision": mixed}})
    groups = sample(policy())
    learner = Learner(config, policy(), compose(config.algorithm), device="cuda", directory=tmp_path)
    assert learner.mismatch(groups) < bound
    before = {name: tensor.clone() for name, tensor in learner.weights()}
    report = learner.step(packed(groups))
    assert report["skipped_updates"] == 0 and np.isfinite(report["grad_norm"])
    assert any(not torch.equal(before[name], tensor) for name, tensor in learner.weights())
