"""The composed loss: a whole sum by hand, independence of micro-batches, and the health figures."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from engine.algorithms.aggregates import AGGREGATES
from engine.algorithms.corrections import CORRECTIONS
from engine.algorithms.losses import LOSSES
from engine.algorithms.method import Tokens, compose, means
from engine.config import Algorithm, ConfigError

ARGUMENTS = {"cispo": {"high": 0.3}, "constant": {"length": 16}}


def slot(name):
    return {"name": name, **ARGUMENTS.get(name, {})}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def batch(seed, lengths):
    """Completions of random numbers with some stale tokens, and the policy's log-probabilities and entropies."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)

    def normal():
        return torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    behaviour = -normal().abs()
    proximal = behaviour + 0.2 * normal()
    tokens = Tokens(
        behaviour=behaviour,
        advantage=normal(),
        mask=(torch.rand(num_tokens, generator=generator) > 0.2).double(),
        sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        lengths=torch.tensor(lengths),
        proximal=proximal,
        reference=behaviour + 0.3 * normal(),
    )
    return proximal + 0.2 * normal(), normal().abs(), tokens


def part(tokens, first, last):
    """The completions first..last-1 as a micro-batch of their own, and the places of their tokens."""
    here = (tokens.sequence >= first) & (tokens.sequence < last)
    return here, Tokens(
        behaviour=tokens.behaviour[here],
        advantage=tokens.advantage[here],
        mask=tokens.mask[here],
        sequence=tokens.sequence[here] - first,
        lengths=tokens.lengths[first:last],
        proximal=tokens.proximal[here],
        reference=tokens.reference[here],
    )


def test_the_whole_sum_by_hand():
    method = compose(
        Algorithm(
            correction={"name": "tis", "cap": 1.5},
            loss={"name": "ppo_clip", "low": 0.2, "high": 0.2},
            aggregate={"name": "token_mean"},
            kl={"name": "k2", "coefficient": 0.1},
            entropy=0.01,
        )
    )
    proximal = tensor(-1.0, -2.0, -3.0)
    tokens = Tokens(
        behaviour=proximal - tensor(2.0, 0.5, 1.0).log(),  # w: 1.5, 0.5, 1
        advantage=tensor(1.0, -1.0, 9.0),
        mask=tensor(1.0, 1.0, 0.0),
        sequence=torch.tensor([0, 0, 0]),
        lengths=torch.tensor([3]),
        proximal=proximal,
        reference=tensor(-1.0, -1.0, -1.0),
    )
    logprob = proximal + tensor(1.1, 1.5, 1.0).log()  # phi: -1.1, 1.5
    entropy = tensor(2.0, 3.0, 4.0)
    loss, sums = method.loss(logprob, entropy, tokens, num_tokens=4, num_sequences=2)
    k = [math.log(1.1) ** 2 / 2, (math.log(1.5) - 1) ** 2 / 2]
    expected = (1.5 * -1.1 + 0.1 * k[0] - 0.01 * 2) / 4 + (0.5 * 1.5 + 0.1 * k[1] - 0.01 * 3) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    rho = [2.0 * 1.1, 0.5 * 1.5]
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {
            "tokens": 2,
            "clipped": 0,
            "weight": 2.0,
            "rejected": 0,
            "ratio": sum(rho),
            "ratio_squared": rho[0] ** 2 + rho[1] ** 2,
            "drift": abs(math.log(rho[0])) + abs(math.log(rho[1])),
            "drift_k1": -math.log(rho[0]) - math.log(rho[1]),
            "drift_k2": (math.log(rho[0]) ** 2 + math.log(rho[1]) ** 2) / 2,
            "drift_k3": sum(rho) - 2 - math.log(rho[0]) - math.log(rho[1]),
            "kl": sum(k),
            "entropy": 5.0,
        }
    )


@pytest.mark.parametrize(("loss", "correction", "aggregate"), [*itertools.product(LOSSES, CORRECTIONS, AGGREGATES)])
def test_micro_batches_add_up_to_the_whole(loss, correction, aggregate):
    method = compose(
        Algorithm(
            correction=slot(correction),
            loss=slot(loss),
            aggregate=slot(aggregate),
            kl={"name": "k3", "coefficient": 0.1},
            entropy=0.01,
        )
    )
    lengths = [3, 1, 4, 2, 5]
    logprob, entropy, tokens = batch(7, lengths)
    normalisers = {"num_tokens": sum(lengths), "num_sequences": len(lengths)}
    whole = logprob.clone().requires_grad_()
    expected, expected_sums = method.loss(whole, entropy, tokens, **normalisers)
    expected.backward()

    split, total, sums = logprob.clone().requires_grad_(), 0.0, dict.fromkeys(expected_sums, 0.0)
    for first, last in [(0, 1), (1, 1), (1, 4), (4, 5)]:  # one of them empty
        here, few = part(tokens, first, last)
        value, few_sums = method.loss(split[here], entropy[here], few, **normalisers)
        value.backward()
        total += value.item()
        sums = {name: sums[name] + few_sums[name].item() for name in sums}
    assert total == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-12, atol=1e-15)
    assert sums == pytest.approx({name: value.item() for name, value in expected_sums.items()}, rel=1e-12)


@pytest.mark.parametrize("correction", [name for name in CORRECTIONS if name != "none"])
def test_a_correction_recomputes_the_proximal_policy(correction):
    assert compose(Algorithm(correction=slot(correction))).needs_proximal


def test_without_a_correction_the_behaviour_policy_is_proximal():
    method = compose(Algorithm())
    logprob, _, tokens = batch(1, [4, 4])
    assert not method.needs_proximal
    loss, _ = method.loss(logprob, None, tokens, num_tokens=8, num_sequences=2)
    r = (logprob - tokens.behaviour).exp()
    phi = torch.maximum(-tokens.advantage * r, -tokens.advantage * r.clamp(0.8, 1.2))
    torch.testing.assert_close(loss, (phi * tokens.mask).sum() / 8)


def test_without_proximal_log_probabilities_the_policy_is_its_own():
    method = compose(Algorithm(correction={"name": "decoupled"}))
    logprob, _, given = batch(2, [4, 4])
    tokens = Tokens(given.behaviour, given.advantage, given.mask, given.sequence, given.lengths)
    logprob.requires_grad_()
    loss, _ = method.loss(logprob, None, tokens, num_tokens=8, num_sequences=2)
    loss.backward()
    rho = (logprob.detach() - given.behaviour).exp()
    torch.testing.assert_close(logprob.grad, -rho * given.advantage * given.mask / 8)


def test_what_a_method_needs():
    plain = compose(Algorithm())
    assert not plain.needs_reference and not plain.needs_entropy
    assert compose(Algorithm(kl={"name": "k3", "coefficient": 0.1})).needs_reference
    assert compose(Algorithm(entropy=-0.1)).needs_entropy


def test_masked_tokens_have_no_say_whatever_their_numbers():
    method = compose(Algorithm(correction={"name": "sequence"}, loss={"name": "gspo"}, aggregate=slot("sequence_mean")))
    logprob, _, tokens = batch(3, [5, 3])
    assert tokens.proximal is not None
    loud = torch.tensor([1, 6])
    tokens.mask[loud] = 0
    before, _ = method.loss(logprob, None, tokens, num_tokens=8, num_sequences=2)
    tokens.advantage[loud], tokens.behaviour[loud], tokens.proximal[loud] = 1e3, -50.0, -9.0
    after, _ = method.loss(logprob, None, tokens, num_tokens=8, num_sequences=2)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_entropy_is_reported_where_it_is_not_trained():
    logprob, entropy, tokens = batch(4, [4])
    method = compose(Algorithm())
    silent, _ = method.loss(logprob, None, tokens, num_tokens=4, num_sequences=1)
    loss, sums = method.loss(logprob, entropy, tokens, num_tokens=4, num_sequences=1)
    torch.testing.assert_close(loss, silent)
    torch.testing.assert_close(sums["entropy"], (entropy * tokens.mask).sum())


def test_sums_carry_no_gradient():
    method = compose(Algorithm(kl={"name": "k2", "coefficient": 0.1}, entropy=0.1))
    logprob, entropy, tokens = batch(5, [4])
    _, sums = method.loss(logprob.requires_grad_(), entropy.requires_grad_(), tokens, num_tokens=4, num_sequences=1)
    assert not any(value.requires_grad for value in sums.values())


def test_a_float32_mask_does_not_cost_a_float64_loss_its_digits():
    logprob, _, tokens = batch(6, [3])
    coarse = Tokens(tokens.behaviour, tokens.advantage, tokens.mask.float(), tokens.sequence, tokens.lengths)
    exact, _ = compose(Algorithm()).loss(logprob, None, tokens, num_tokens=3, num_sequences=1)
    loss, _ = compose(Algorithm()).loss(logprob, None, coarse, num_tokens=3, num_sequences=1)
    torch.testing.assert_close(loss, exact, rtol=1e-15, atol=0)


def test_means():
    figures = means({"tokens": 4.0, "clipped": 1.0, "ratio": 4.0, "ratio_squared": 10.0, "kl": 2.0})
    assert figures == {"clipped": 0.25, "ratio": 1.0, "kl": 0.5, "effective_sample_size": 0.4}
    assert means({"tokens": 0.0, "ratio": 0.0, "ratio_squared": 0.0}) == {}


def test_k1_as_a_loss_is_warned_of():
    with pytest.warns(UserWarning, match="algorithm.kl.name = 'k1'"):
        compose(Algorithm(kl={"name": "k1", "coefficient": 0.1}))


def test_corrected_k1_is_not(recwarn):
    compose(Algorithm(kl={"name": "k1", "coefficient": 0.1, "corrected": True}))
    assert not recwarn.list


def test_a_corrected_divergence_takes_its_ratio_against_the_proximal_policy():
    logprob, _, tokens = batch(8, [3, 2])
    assert tokens.proximal is not None and tokens.reference is not None
    kl = {"name": "k1", "coefficient": 0.5, "corrected": True}
    method = compose(Algorithm(correction={"name": "decoupled"}, loss={"name": "importance"}, kl=kl))
    loss, _ = method.loss(logprob, None, tokens, num_tokens=5, num_sequences=2)
    r, rho = (logprob - tokens.proximal).exp(), (tokens.proximal - tokens.behaviour).exp()
    expected = -rho * tokens.advantage * r + 0.5 * r * (logprob - tokens.reference)
    torch.testing.assert_close(loss, (expected * tokens.mask).sum() / 5)


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"loss": {"name": "ppo_clip", "lo": 0.2}}, "algorithm.loss.lo = 0.2: ppo_clip takes low, high, dual"),
        ({"loss": {"name": "cispo"}}, "algorithm.loss.high: cispo needs it"),
        ({"kl": {"name": "k3"}}, "algorithm.kl.coefficient: k3 needs it"),
        ({"kl": {"name": "k4"}}, "algorithm.kl.name = 'k4': must be one of k1, k2, k3"),
        (
            {"advantage": {"name": "gea"}},
            "algorithm.advantage.name = 'gea': must be one of none, group_mean, group_norm,",
        ),
        ({"correction": {"name": "icepop", "low": 2}}, "algorithm.correction.low = 2: Expected 'float' <= 1.0"),
        ({"aggregate": {"name": "constant", "length": 0}}, "algorithm.aggregate.length = 0: Expected 'int' >= 1"),
    ],
)
def test_a_mistake_names_the_slot_and_the_key(tables, line):
    with pytest.raises(ConfigError) as error:
        compose(Algorithm(**tables))
    assert str(error.value).startswith(line)


def test_mismatch_is_the_drift_of_the_policys_own_tokens_alone():
    tokens = Tokens(
        behaviour=tensor(-1.0, -1.0, -1.0, -1.0),
        advantage=tensor(1.0, 1.0, 1.0, 1.0),
        mask=tensor(1.0, 1.0, 0.0, 1.0),
        sequence=torch.tensor([0, 0, 1, 1]),
        lengths=torch.tensor([2, 2]),
        staleness=torch.tensor([0, 0, 0, 1]),
    )
    logprob = tensor(-1.1, -0.7, -5.0, -3.0)
    _, sums = compose(Algorithm()).loss(logprob, None, tokens, num_tokens=4, num_sequences=2)
    figures = means({name: float(value) for name, value in sums.items()})
    assert figures["mismatch"] == pytest.approx((0.1 + 0.3) / 2)  # the third is masked, the fourth of another version
    assert figures["drift"] == pytest.approx((0.1 + 0.3 + 2.0) / 3)
    assert "own" not in figures

    _, sums = compose(Algorithm()).loss(logprob, None, replace(tokens, moved=True), num_tokens=4, num_sequences=2)
    assert sums["own"] == 0
    none = {name: float(value) for name, value in sums.items()} | {"own": 0.0, "mismatch": 0.0}
    assert "mismatch" not in means(none)
