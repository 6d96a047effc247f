"""The prompt cursor: which domain is next, and which of its prompts.

All is a function of the seed, of how often each domain was drawn and, where the curriculum asks for it, of what became
of the draws before, so the cursor's state is a few numbers. What is held out for evaluation is the same under every
seed and never met in training, across all domains.
"""

import bisect
import itertools
import random
from collections import Counter
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from engine.algorithms.mixtures import MIXTURES
from engine.algorithms.slots import bind
from engine.config import Config, ConfigError
from engine.schema import Prompt
from engine.sources import MAX_REDRAWS, Generated, Source, derive, open_source
from engine.tally import Exhausted, Tally

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NOTHING = Tally()  # before the first draw


class Prompts:
    """The prompts of all domains. Construction reads and checks the data and raises `ConfigError`."""

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase"):
        self._seed = config.run.seed
        self._domains = {domain.name: domain for domain in config.domains}
        self._names = list(self._domains)
        self._curriculum = config.curriculum
        self._mixture = bind("curriculum.mixture", config.curriculum.mixture, MIXTURES)
        self._num_draws = 0
        self._num_drawn = dict.fromkeys(self._names, 0)
        self._sources: dict[str, Source] = {}
        self._held_out: list[Prompt] = []
        for number, domain in enumerate(config.domains):
            source = self._sources[domain.name] = open_source(config, number, tokenizer)
            self._held_out += hold_out(f"domains.{number}", source, domain.eval_prompts, bool(domain.eval_path))
        texts = frozenset(prompt.text for prompt in self._held_out)
        for source in self._sources.values():
            source.restrict(texts)

    def draw(self, tally: Tally = NOTHING, left_out: Container[str] = ()) -> tuple[str, int]:
        """The next group's domain, none of `left_out`, and the number of its prompt there; moves the cursor, past
        prompts that the curriculum leaves out. Raises `Exhausted`, and leaves the cursor, where it leaves out all of
        the domain's."""
        name = self._draw_domain([name for name in self._names if name not in left_out], tally)
        first, most = self._num_drawn[name], 2 * len(self._sources[name])  # wherever it starts, in these is an epoch
        for index in range(first, first + (most or 1)):
            if self.is_wanted(name, index, tally):
                self._num_draws += 1
                self._num_drawn[name] = index + 1
                return name, index
        low, high = self._curriculum.pass_rate
        raise Exhausted(f"curriculum.pass_rate = [{low}, {high}]", name)

    def _draw_domain(self, names: list[str], tally: Tally) -> str:
        counts = (tally.rollouts, tally.trained, tally.ended, tally.in_flight)
        columns = (np.array([count[name] for name in names], np.float64) for count in counts)
        weights = np.array([self._domains[name].weight for name in names], np.float64)
        bounds = list(itertools.accumulate(self._mixture(weights, *columns).tolist()))
        point = random.Random(derive(self._seed, "draw", self._num_draws)).random() * bounds[-1]
        return names[bisect.bisect(bounds, point)]

    def is_wanted(self, name: str, index: int, tally: Tally) -> bool:
        """Whether the curriculum lets the prompt be drawn, after what `tally` says of its last draws."""
        low, high = self._curriculum.pass_rate
        if (low, high) == (0.0, 1.0) or not self.comes_again(name):
            return True
        share = tally.share(name, self.prompt(name, index).text)
        return share is None or low <= share <= high

    def comes_again(self, domain: str) -> bool:
        """Whether the domain's prompts are finitely many, so that what was learned of one may be of use later."""
        return len(self._sources[domain]) > 0

    def prompt(self, domain: str, index: int) -> Prompt:
        """The training prompt `index` of `domain`."""
        return self._sources[domain].prompt(index)

    def held_out(self) -> list[Prompt]:
        """The evaluation's prompts, domain by domain; `index` counts within the domain."""
        return self._held_out

    @property
    def redrawn(self) -> Counter[str]:
        """How many generated prompts were drawn again so far, by reason."""
        counts = (source.redrawn for source in self._sources.values() if isinstance(source, Generated))
        return sum(counts, Counter())

    def state(self) -> dict[str, Any]:
        return {"num_draws": self._num_draws, "num_drawn": dict(self._num_drawn)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken. Raises `ValueError` where the domains are others."""
        if list(state["num_drawn"]) != self._names:
            raise ValueError(f"the cursor is of the domains {list(state['num_drawn'])}, not {self._names}")
        self._num_draws = state["num_draws"]
        self._num_drawn = dict(state["num_drawn"])


def hold_out(field: str, source: Source, num_prompts: int, whole_file: bool) -> list[Prompt]:
    """The first `num_prompts` different prompts that `source` offers; all of an evaluation file where it is 0."""
    if num_prompts == 0 and not whole_file:
        return []
    chosen: dict[str, Prompt] = {}
    repeats = 0
    for prompt in source.candidates():
        repeats = repeats + 1 if prompt.text in chosen else 0
        if repeats == MAX_REDRAWS:  # a generated domain may have fewer prompts than asked for
            break
        chosen.setdefault(prompt.text, msgspec.structs.replace(prompt, index=len(chosen)))
        if len(chosen) == num_prompts:
            break
    if len(chosen) < num_prompts:
        raise ConfigError(f"{field}.eval_prompts = {num_prompts}: there are only {len(chosen)} different prompts")
    return list(chosen.values())
