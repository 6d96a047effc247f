"""What a reward says of one completion."""

import msgspec


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """A part of a completion that was judged for itself. `end` counts the completion's characters up to and with it;
    `score` is its own or that of all up to its end, as the reward chose."""

    end: int
    score: float


class Verdict(msgspec.Struct, frozen=True):
    """The judgement of one completion.

    `score` is the reward; `solved` says whether the task counts as done (accuracy is its mean); `parts` holds the
    terms that make up the score; `evidence` short texts for people (what was parsed, which test failed); `segments`
    the scores of parts of the completion, in its order, where the reward judges those too; `costs` what the judgement
    took (seconds, tokens), which is averaged in the metrics.

    A non-empty `error` means that no judgement was possible: the completion is masked in training (it carries no
    gradient and moves no baseline) and counted, and `score` is meaningless.
    """

    score: float
    solved: bool
    parts: dict[str, float] = {}
    evidence: dict[str, str] = {}
    error: str = ""
    segments: list[Segment] = []
    costs: dict[str, float] = {}

    @classmethod
    def of(cls, value: "float | bool | Verdict") -> "Verdict":
        """Accepts what a user's reward returns: a number (solved when it is at least 1) or a whole `Verdict`."""
        if isinstance(value, Verdict):
            return value
        return cls(score=float(value), solved=float(value) >= 1.0)

    @classmethod
    def failed(cls, reason: str, evidence: dict[str, str] | None = None) -> "Verdict":
        """The verdict of a reward that raised, hung or died, or of a judge that gave no score."""
        return cls(score=0.0, solved=False, error=reason, evidence={} if evidence is None else evidence)


def brief(text: str, longest: int = 80) -> str:
    """`text` short enough for a ledger of many thousand completions."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
