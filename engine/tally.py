"""What became of the groups so far, by domain and by prompt: what the next draws depend on.

All of it follows from the ledger, so no checkpoint holds it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from engine.config import ConfigError
from engine.schema import End


class PassRate(msgspec.Struct, frozen=True):
    """How often a prompt was solved when it was last drawn, and its number in the domain then."""

    domain: str
    prompt: str  # digest of its text
    index: int
    solved: int
    judged: int

    @property
    def share(self) -> float:
        return self.solved / self.judged


class Exhausted(ConfigError):
    """The curriculum leaves out every prompt of `domain`."""

    def __init__(self, reason: str, domain: str):
        super().__init__(f"{reason}: no prompt of domain {domain!r} is left")
        self.domain = domain


class Tally:
    """Counts by domain; pass rates of prompts that come again, the newest draw's of each."""

    def __init__(self) -> None:
        self.rollouts: Counter[str] = Counter()  # completed, before any filter
        self.trained: Counter[str] = Counter()  # groups
        self.ended: Counter[str] = Counter()
        self.in_flight: Counter[str] = Counter()
        self._rates: dict[tuple[str, str], PassRate] = {}

    def drawn(self, domain: str) -> None:
        self.in_flight[domain] += 1

    def arrived(self, domain: str, num_samples: int) -> None:
        self.rollouts[domain] += num_samples

    def end(self, domain: str, end: End) -> None:
        self.in_flight[domain] -= 1
        self.ended[domain] += 1
        self.trained[domain] += end == "trained"

    def suffices(self, num_groups: int) -> bool:
        """Whether `num_groups` of those in flight will be trained if as large a share of them as of all groups so far
        ends otherwise."""
        in_flight, trained, ended = (counts.total() for counts in (self.in_flight, self.trained, self.ended))
        return in_flight * (in_flight + trained) >= num_groups * max(1, in_flight + ended)

    def judged(self, rate: PassRate) -> None:
        """The prompt's, unless a later draw of it is known. Of nothing judged nothing is learned."""
        place = rate.domain, rate.prompt
        known = self._rates.get(place)
        if rate.judged and (known is None or known.index <= rate.index):
            self._rates[place] = rate

    def share(self, domain: str, text: str) -> float | None:
        """The newest pass rate of the prompt; None where there is none."""
        rate = self._rates.get((domain, digest(text)))
        return None if rate is None else rate.share

    def read(self, path: Path) -> None:
        """Takes the pass rates of an earlier run, which are older than any of this one. Raises `ConfigError`."""
        try:
            rates = [msgspec.json.decode(line, type=PassRate) for line in path.read_bytes().splitlines()]
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"curriculum.rates: cannot read {path}: {error}") from error
        self._rates |= {(rate.domain, rate.prompt): msgspec.structs.replace(rate, index=-1) for rate in rates}

    def write(self, path: Path) -> None:
        rates = sorted(self._rates.values(), key=lambda rate: (rate.domain, rate.index, rate.prompt))
        path.write_bytes(b"".join(msgspec.json.encode(rate) + b"\n" for rate in rates))


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def count(rows: Iterable[dict[str, Any]], known: Iterable[str]) -> Tally:
    """The tally of the ledger's `rows`, one a group with its `num_samples`; pass rates from the files `known`."""
    tally = Tally()
    for path in known:
        tally.read(Path(path))
    for row in rows:
        tally.drawn(row["domain"])
        tally.arrived(row["domain"], row["num_samples"])
        if row["ended"] is not None:
            tally.end(row["domain"], row["state"])
    return tally
