"""The same mathematics on a GPU as on a CPU; run by bench/gpu.sh where there is one."""

import multiprocessing
import os
import signal
import time
from contextlib import ExitStack, closing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.cuda import nccl

from engine.algorithms.method import compose
from engine.attention import Layout, attend_cuda, attend_plain
from engine.config import parse
from engine.generators.embedded import Embedded
from engine.learner import Learner
from engine.model import build
from engine.packer import pack
from engine.schema import Group, Lease, Prompt, Sampling
from engine.weights import Manifest, Publisher, Server, collective, subscribe
from engine.weights.collective import Broadcaster, CollectiveSource
from engine.weights.group import Nccl
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
    assert learner.peak_memory()["gpu_memory_gb"] > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in learner.weights())


NAME = f"gpu-{os.getpid()}"
PIECE_BYTES = 1 << 20
WEIGHTS = Manifest.lay_out([("a", (1000, 1000), torch.float32), ("b", (7,), torch.float32)])  # 4 pieces
WAIT_S = 120.0


def weights_of(version):
    return [(entry.name, torch.full(entry.shape, float(version))) for entry in WEIGHTS.entries]


def stage_by_nccl(pipe, segment, port):
    """A generator's process: stages what the pipe says, (version, piece at which to die), and says what it has."""
    Nccl.piece_bytes = PIECE_BYTES
    landed, left = Nccl.landed, 0

    def dying(self, slot, num_bytes):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return landed(self, slot, num_bytes)

    Nccl.landed = dying
    place = {"segment": segment, "host": "", "address": f"tcp://127.0.0.1:{port}", "timeout_s": WAIT_S}
    with closing(subscribe("collective", broadcast_s=WAIT_S / 4, device="cuda", **place)) as subscriber:
        pipe.send("here")
        while True:
            version, left = pipe.recv()
            staged = subscriber.stage(0, version)
            values = {tensor.unique().item() for tensor in staged.tensors.values()}
            source = subscriber._source
            assert isinstance(source, CollectiveSource)
            pipe.send((staged.digest, values, source.num_received, type(source._group).__name__))


def test_weights_travel_by_nccl_and_outlive_a_generator(monkeypatch):
    if nccl.version() < (2, 30):
        pytest.skip(f"NCCL {nccl.version()} has no two ranks on one GPU: 2.30 does")
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setattr(Nccl, "piece_bytes", PIECE_BYTES)
    monkeypatch.setattr(collective, "GATHER", 0.1)
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork

    def generator(stack, port):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=stage_by_nccl, args=(theirs, NAME, port), daemon=True)
        process.start()
        stack.callback(process.kill)
        theirs.close()
        assert ours.poll(WAIT_S) and ours.recv() == "here"
        return ours

    def staged(pipe, version):
        """How many broadcasts have brought this generator something."""
        digest = publisher.publish(0, version, weights_of(version))
        pipe.send((version, 0))
        assert pipe.poll(WAIT_S)
        found, values, num_received, kind = pipe.recv()
        assert (found, values, kind) == (digest, {float(version)}, "Nccl" if num_received else "NoneType")
        return num_received

    with ExitStack() as stack:
        publisher = stack.enter_context(closing(Publisher(NAME, WEIGHTS)))
        source = Broadcaster(NAME, "127.0.0.1", step_s=10.0, whole_s=60.0, device="cuda")
        server = stack.enter_context(closing(Server(NAME, "127.0.0.1", caller=source)))
        pipe = generator(stack, server.port)
        assert [staged(pipe, version) for version in (1, 2, 3)] == [1, 2, 3]
        assert source._epoch == 1
        publisher.publish(0, 4, weights_of(4))
        pipe.send((4, 2))
        with pytest.raises(EOFError):
            pipe.poll(WAIT_S)
            pipe.recv()
        begin = time.monotonic()
        while not source.num_broken:  # its wait for the dead one ends
            assert time.monotonic() - begin < WAIT_S
            time.sleep(0.1)
        pipe = generator(stack, server.port)
        assert [staged(pipe, version) for version in (5, 6)] == [1, 2]
