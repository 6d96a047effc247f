"""The name that somebody may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """" (did you mean X?)" with the nearest of `allowed`; empty where none is near."""
    nearest = get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
