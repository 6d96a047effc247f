"""What a reward says of one completion."""

import msgspec


class Verdict(msgspec.Struct, frozen=True):
    """The judgement of one completion.

    `score` is the reward; `solved` says whether the task counts as done (accuracy is its mean); `parts` holds the
    terms that make up the score; `evidence` short texts for people (what was parsed, which test failed). A non-empty
    `error` means that no judgement was possible: the completion is masked in training and counted, and `score` is
    meaningless.
    """

    score: float
    solved: bool
    parts: dict[str, float] = {}
    evidence: dict[str, str] = {}
    error: str = ""

    @classmethod
    def of(cls, value: "float | bool | Verdict") -> "Verdict":
        """Accepts what a user's reward returns: a number (solved when it is at least 1) or a whole `Verdict`."""
        if isinstance(value, Verdict):
            return value
        return cls(score=float(value), solved=float(value) >= 1.0)

    @classmethod
    def failed(cls, reason: str) -> "Verdict":
        """The verdict of a reward that raised, hung or died."""
        return cls(score=0.0, solved=False, error=reason)


def brief(text: str, longest: int = 80) -> str:
    """`text` short enough for a ledger of many thousand completions."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
