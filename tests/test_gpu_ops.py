"""The kernels on a GPU against those on a CPU, through torch's operators; run by bench/gpu.sh where there is one.

tests/driver holds the kernels of both to plain loops, without torch.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.ops import buckets, packing
from engine.ops.loss import Recipe, TokenLoss, Tokens, linear_token_loss, row_stats, token_loss, token_loss_

pytestmark = pytest.mark.gpu


# ---- The token loss

RECIPES = {
    "token": Recipe(("ppo_clip", (0.2, 0.28, 3.0)), ("tis", (2.0,)), ("k3", (0.1, 0.0)), 0.01),
    "sequence": Recipe(("gspo", (0.05, 0.05)), ("sequence", (2.0, 1.0)), None, 0.0),
}
NUM_ROWS, LENGTHS = 96, [1, 40, 0, 55]


def on(device: str, tokens: Tokens) -> Tokens:
    return replace(tokens, **{k: v.to(device) for k, v in vars(tokens).items() if isinstance(v, Tensor)})


def rows(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tokens]:
    """Logits and targets on the CPU; the tokens' log-probabilities near the policy's, some tokens masked."""
    torch.manual_seed(vocab)
    logits, targets = (3 * torch.randn(NUM_ROWS, vocab)).to(dtype), torch.randint(vocab, (NUM_ROWS,))
    logprob = row_stats(logits, targets)[0]
    mask = (torch.rand(NUM_ROWS) > 0.2).float()

    def near(scale: float) -> Tensor:
        return logprob + scale * torch.randn(NUM_ROWS)

    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    tokens = Tokens(near(0.2), torch.randn(NUM_ROWS), mask, mask / NUM_ROWS, bounds, near(0.1), near(0.3))
    return logits, targets, tokens


def distance(ours: Tensor, expected: Tensor) -> float:
    return float((ours.cpu().double() - expected.double()).norm() / (expected.double().norm() + 1e-30))


def agree(ours: TokenLoss, expected: TokenLoss) -> None:
    for field in TokenLoss._fields:
        assert distance(getattr(ours, field), getattr(expected, field)) < 1e-4, field


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("vocab", [1, 1003, 151_936, 300_000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
def test_the_loss_of_logits_is_that_of_the_cpu(recipe, vocab, dtype, bound):
    logits, targets, tokens = rows(vocab, dtype)
    expected = logits.clone()
    loss = token_loss_(expected, targets, tokens, recipe, temperature=0.8)
    places = targets.cuda(), on("cuda", tokens), recipe
    spot = logits.cuda()
    agree(token_loss_(spot, *places, temperature=0.8), loss)
    again = logits.cuda()
    token_loss_(again, *places, temperature=0.8)
    assert torch.equal(spot, again)
    leaf = logits.cuda().requires_grad_()
    apart = token_loss(leaf, *places, temperature=0.8)
    agree(apart, loss)
    apart.loss.backward()
    assert leaf.grad is not None
    for grad in (spot, leaf.grad):
        assert vocab == 1 or distance(grad, expected) < bound


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_loss_of_hidden_states_is_that_of_the_cpu(recipe):
    _, targets, tokens = rows(5003, torch.float32)
    hidden, weight = torch.randn(NUM_ROWS, 64), torch.randn(5003, 64) / 8
    near = torch.log_softmax(hidden @ weight.T, 1).gather(1, targets[:, None])[:, 0]
    drift = tokens.behaviour - tokens.behaviour.mean()
    tokens = replace(tokens, behaviour=near + 0.1 * drift, proximal=near - 0.1 * drift, reference=near + 0.2 * drift)

    def run(device: str) -> tuple[TokenLoss, Tensor | None, Tensor | None]:
        leaves = [leaf.to(device).detach().requires_grad_() for leaf in (hidden, weight)]
        out = linear_token_loss(leaves[0], leaves[1], targets.to(device), on(device, tokens), recipe)
        out.loss.backward()
        return out, leaves[0].grad, leaves[1].grad

    ours, expected = run("cuda"), run("cpu")
    agree(ours[0], expected[0])
    for mine, theirs in zip(ours[1:], expected[1:], strict=True):
        assert mine is not None and theirs is not None and distance(mine, theirs) < 1e-4


def test_a_target_out_of_range_makes_its_row_nan_on_cuda():
    logits, targets, tokens = rows(1003, torch.float32)
    targets[60] = 1003
    tokens.mask[60] = 1
    grad = logits.cuda()
    token_loss_(grad, targets.cuda(), on("cuda", tokens), RECIPES["token"])
    broken = grad.isnan().all(1).cpu()
    assert broken[60] and broken.sum() == 1


# ---- Packed streams, scans, buckets: the same bits, or sums in another order

SIZES = [0, 1, 5000, 0, 33, 2048, 17]
BOUNDS = torch.tensor([0, *SIZES]).cumsum(0).int()
NUM = int(BOUNDS[-1])
STARTS = torch.tensor([9000, 8999, 40, 8000, 5100, 5133, 7181])


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def packed() -> list[Tensor]:
    return packing.pack([drawn(9100), torch.arange(9100), torch.arange(9100).to(torch.uint8)], STARTS, BOUNDS)


STREAMS: dict[str, Callable[[Callable[[Tensor], Tensor]], list[Tensor]]] = {
    "pack": lambda to: packing.pack([to(drawn(9100)), to(torch.arange(9100))], to(STARTS), to(BOUNDS), NUM),
    "unpack": lambda to: packing.unpack([to(each) for each in packed()], to(STARTS), to(BOUNDS), 9100, 7),
    "layout": lambda to: [
        *packing.token_layout(to(torch.arange(NUM)), to(torch.tensor([0, 1, 40, 0, 3, 9, 17])), to(BOUNDS))
    ],
    "sum": lambda to: [packing.segment_sum(to(drawn(NUM)), to(BOUNDS), to((drawn(NUM, 1)[:, 0] > 0).float()))],
    "mean": lambda to: [packing.segment_mean(to(drawn(NUM).double()), to(BOUNDS))],
    "max": lambda to: [packing.segment_max(to(drawn(NUM)), to(BOUNDS))],
    "gae": lambda to: [
        *packing.gae(
            to(drawn(NUM)),
            to(drawn(NUM, 1)[:, 0]),
            to((drawn(1, NUM)[0] > -1).float()),
            to(BOUNDS),
            to(drawn(len(SIZES))),
            gamma=0.99,
            lambda_critic=to(torch.linspace(0.5, 1, len(SIZES))),
            lambda_policy=to(torch.linspace(1, 0, len(SIZES))),
        )
    ],
}


@pytest.mark.parametrize("name", STREAMS)
def test_packed_streams_are_those_of_the_cpu(name):
    ours, expected = STREAMS[name](Tensor.cuda), STREAMS[name](lambda tensor: tensor)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.is_cuda
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-5)
    again = STREAMS[name](Tensor.cuda)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, again, strict=True))


WEIGHTS = [(300, 257), (128,), (64, 128), (1,), (1000, 130)]


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_buckets_and_deltas_are_those_of_the_cpu(source, dtype):
    tensors, offsets, end = [drawn(*shape, dtype=source) for shape in WEIGHTS], [], 0
    for shape in WEIGHTS:
        offsets.append(end)
        end += -(-buckets.span(shape, dtype) // 16) * 16
    kinds = [dtype] * len(WEIGHTS)

    def run(device: str) -> list[Tensor]:
        bucket = torch.full((end,), 0xEE, dtype=torch.uint8, device=device)
        here = [tensor.to(device) for tensor in tensors]
        sums = [buckets.flatten(here, bucket, offsets, kinds)]
        copy = bucket.clone()
        here[0][::7] *= 1.5
        total, delta = buckets.flatten_delta(here, bucket, offsets, kinds)
        delta = delta.trim()
        grown = buckets.apply_delta(copy, delta)
        assert torch.equal(copy, bucket) and int(sums[0] + grown) == int(total) == int(buckets.checksum(bucket))
        return [part.cpu() for part in (*sums, total, bucket, delta.counts, delta.offsets, delta.values)]

    for ours, expected in zip(run("cuda"), run("cpu"), strict=True):
        assert torch.equal(ours, expected)
