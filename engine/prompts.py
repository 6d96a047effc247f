"""The prompt cursor: which domain is next, and which of its prompts.

All is a function of the seed and of how often each domain was drawn, so the cursor's state is a few numbers. What is
held out for evaluation is the same under every seed and never met in training, across all domains.
"""

import bisect
import itertools
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from engine.config import Config, ConfigError
from engine.schema import Prompt
from engine.sources import MAX_REDRAWS, Generated, Source, derive, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompts:
    """The prompts of all domains. Construction reads and checks the data and raises `ConfigError`."""

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase"):
        self._seed = config.run.seed
        self._domains = {domain.name: domain for domain in config.domains}
        self._names = list(self._domains)
        self._bounds = list(itertools.accumulate(domain.weight for domain in config.domains))
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

    def draw(self) -> tuple[str, int]:
        """The next group's domain and the number of its prompt there; moves the cursor."""
        point = random.Random(derive(self._seed, "draw", self._num_draws)).random() * self._bounds[-1]
        name = self._names[bisect.bisect(self._bounds, point)]
        index = self._num_drawn[name]
        self._num_draws += 1
        self._num_drawn[name] += 1
        return name, index

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
