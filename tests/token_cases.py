"""Cases of the token loss drawn at random, and what plain torch makes of them in float64."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.algorithms import method
from engine.algorithms.method import Method, compose
from engine.algorithms.segments import Segments
from engine.config import Algorithm
from engine.ops.loss import HEALTH, Recipe, TokenLoss, Tokens

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
NUM_BINS = 4
NO_KL = {"name": "k3", "coefficient": 0.0}


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high)


def slot(name: str, **arguments: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"name": st.just(name), **arguments})


SURROGATES = st.one_of(
    slot("reinforce"),
    slot("importance"),
    slot("ppo_clip", low=between(0, 0.5), high=between(0, 0.5), dual=st.none() | between(1, 3)),
    slot("cispo", low=between(0, 1), high=between(0, 2)),
    slot("icepop", low=between(0, 1), high=between(1, 3)),
    slot("dppo", low=between(0, 0.1), high=between(0, 0.1)),
    slot("sapo", positive=between(0.5, 2), negative=between(0.5, 2)),
    slot("gspo", low=between(0, 0.1), high=between(0, 0.1)),
    slot("gspo_token", low=between(0, 0.1), high=between(0, 0.1)),
)
CORRECTIONS = st.one_of(
    slot("none"),
    slot("decoupled"),
    slot("tis", cap=between(1, 2)),
    slot("icepop", low=between(0, 1), high=between(1, 3)),
    slot("sequence", cap=between(1, 2), geometric=st.booleans()),
    slot("sequence_mask", low=between(0, 1), high=between(1, 3), geometric=st.booleans()),
)
DIVERGENCES = st.one_of(
    st.just(NO_KL),
    slot("k1", coefficient=between(0.01, 1), corrected=st.booleans()),
    slot("k2", coefficient=between(0.01, 1), corrected=st.booleans()),
    slot("k3", coefficient=between(0.01, 1), corrected=st.booleans()),
)
ALGORITHMS = st.builds(
    lambda surrogate, correction, divergence, aggregate, entropy: Algorithm(
        loss=surrogate, correction=correction, kl=divergence, aggregate={"name": aggregate}, entropy=entropy
    ),
    SURROGATES,
    CORRECTIONS,
    DIVERGENCES,
    st.sampled_from(["token_mean", "sequence_mean", "sequence_sum"]),
    st.just(0.0) | between(-0.1, 0.1),
)
PPO = Algorithm(loss={"name": "ppo_clip", "low": 0.0, "high": 0.0}, correction={"name": "tis"}, kl=NO_KL)


@dataclass(frozen=True)
class Case:
    """Tokens in completions of `lengths`, and a head of `vocab` and `width` that predicts them."""

    algorithm: Algorithm
    dtype: torch.dtype
    lengths: list[int]
    vocab: int
    width: int = 6
    temperature: float = 1.0
    has_proximal: bool = True
    has_staleness: bool = True
    moved: bool = False
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def method(self) -> Method:
        return compose(self.algorithm)

    @cached_property
    def recipe(self) -> Recipe:
        m = self.method
        recipe = Recipe.of(
            m.surrogate, m.correction, m.divergence if m.needs_reference else None, m.entropy_coefficient
        )
        assert recipe is not None
        return recipe

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64).to(dtype)

    @cached_property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden [N, H], weight [V, H], targets [N])."""
        hidden = self._normal(self.num_tokens, self.width, dtype=self.dtype)
        weight = self._normal(self.vocab, self.width, dtype=self.dtype)
        return hidden, weight, torch.randint(self.vocab, (self.num_tokens,), generator=self._generator)

    @cached_property
    def logits(self) -> Tensor:
        hidden, weight, _ = self.head
        return (hidden.double() @ weight.double().T).to(self.dtype)

    @cached_property
    def tokens(self) -> Tokens:
        """About a third of them masked or of no advantage; ratios around 1."""
        n = self.num_tokens
        wide = torch.promote_types(self.dtype, torch.float32)
        targets = self.head[2]
        policy = torch.log_softmax(self.logits.double() / self.temperature, 1).gather(1, targets[:, None])[:, 0]

        def near(scale: float) -> Tensor:
            return (policy + scale * self._normal(n, dtype=torch.float64)).to(wide)

        def some(share: float) -> Tensor:
            return (torch.rand(n, generator=self._generator) < share).to(wide)

        mask = some(0.8)
        staleness = torch.randint(NUM_BINS + 2, (n,), generator=self._generator, dtype=torch.int32)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
        completions = Segments(self._sequence, mask.double(), len(self.lengths))
        omega = self.method.aggregate(completions, torch.tensor(self.lengths), n, len(self.lengths))
        return Tokens(
            behaviour=near(0.3),
            advantage=self._normal(n, dtype=wide) * some(0.8),
            mask=mask,
            omega=omega.to(wide),
            cu_seqlens=cu_seqlens,
            proximal=near(0.2) if self.has_proximal else None,
            reference=near(0.5) if self.method.needs_reference else None,
            staleness=staleness if self.has_staleness else None,
            moved=self.moved,
        )

    @property
    def _sequence(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.int64))

    def reference(self, logits: Tensor) -> "Expected":
        """The loss of logits [N, V] by `engine.algorithms`, in float64."""
        logprobs = torch.log_softmax(logits.double() / self.temperature, dim=1)
        logprob = logprobs.gather(1, self.head[2][:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(1)
        known, t = {}, self.tokens
        for name in ("behaviour", "advantage", "mask", "proximal", "reference"):
            value = getattr(t, name)
            known[name] = None if value is None else value.double()
        tokens = method.Tokens(
            **known,
            sequence=self._sequence,
            lengths=torch.tensor(self.lengths),
            staleness=t.staleness,
            moved=t.moved,
        )
        num = {"num_tokens": self.num_tokens, "num_sequences": len(self.lengths)}
        loss, sums = self.method.loss(logprob, entropy, tokens, **num)
        sums = {"loss": loss.detach(), **sums}
        health = torch.tensor([float(sums.get(name, 0)) for name in HEALTH], dtype=torch.float64)
        return Expected(loss, logprob, entropy, health)

    def histogram(self) -> Tensor:
        if self.tokens.staleness is None:
            return torch.zeros(NUM_BINS, dtype=torch.float64)
        ages = self.tokens.staleness[self.tokens.mask != 0].clamp(0, NUM_BINS - 1)
        return torch.bincount(ages, minlength=NUM_BINS).double()


@dataclass(frozen=True)
class Expected:
    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    health: Tensor  # without the histogram


CASES = st.builds(
    Case,
    algorithm=ALGORITHMS,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    vocab=st.integers(2, 40),
    temperature=st.sampled_from([1.0, 0.7]),
    has_proximal=st.booleans(),
    has_staleness=st.booleans(),
    moved=st.booleans(),
    seed=st.integers(0, 2**20),
)


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """For modules that import it: what operators leave unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def same(ours: Tensor, theirs: Tensor) -> bool:
    return close(ours, theirs, TOLERANCE[ours.dtype])


def close(ours: Tensor, theirs: Tensor, tolerance: float, floor: float = 0.1) -> bool:
    """Whether ours differ by less than `tolerance` of the norm, or of `floor` where that is smaller."""
    difference = (ours.detach().double() - theirs.detach().double()).norm()
    return bool(difference <= tolerance * max(float(theirs.detach().double().norm()), floor))


def check(case: Case, out: TokenLoss, expected: Expected, tolerance: float) -> None:
    """Everything that `out` says but its gradient."""
    unmasked = case.tokens.mask != 0
    assert close(out.loss, expected.loss.detach(), tolerance)
    assert close(out.logprob, expected.logprob.detach() * unmasked, tolerance, floor=1)
    assert close(out.entropy, expected.entropy.detach() * unmasked, tolerance, floor=1)
    assert close(out.health[: len(HEALTH)], expected.health, tolerance)
    assert torch.equal(out.health[len(HEALTH) :], case.histogram())
    (slope,) = torch.autograd.grad(expected.loss, expected.logprob, retain_graph=True, allow_unused=True)
    assert slope is not None and close(out.coefficient, slope, tolerance)
    assert not out.ratio[~unmasked].any()
