"""Instruction following: the verifiable constraints of IFEval (arXiv:2311.07911), named and given as there."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from rewards.answer import after_thinking
from rewards.verdict import Verdict, brief

LANGUAGES = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
ABBREVIATION = re.compile(
    r"\b(Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Inc|Ltd|vs|e\.g|i\.e|[A-Z]|(?:[ap]\.m|etc)(?=\.\s+[a-z]))\.(?=\s)"
)
SURE = 0.8  # of a language; few words of no language at all get up to that

Check = Callable[..., bool]  # (text, **arguments) -> whether the text keeps to the constraint


def follows(
    prompt: str,
    completion: str,
    answer: str = "",
    *,
    mode: Literal["fraction", "all"] = "fraction",
    loose: bool = False,
    instruction_id_list: Any = (),
    kwargs: Any = (),
    **fields: Any,
) -> Verdict:
    """The share of the constraints that what follows the thinking keeps to; with mode "all" 1 for all, else 0.

    They are given as in IFEval, by the fields `instruction_id_list` and `kwargs` (one table each), or as JSON of these
    two, or of a list of them, in `answer`. Solved means all of them. `loose` tries the text also without its first
    line, its last line, both, and each without asterisks. An empty text keeps to none. Raises `ValueError` for an
    unknown constraint or argument.
    """
    given = json.dumps([{"instruction_id": list(instruction_id_list), "kwargs": list(kwargs)}])
    constraints = read_constraints(given if instruction_id_list else answer)
    text = after_thinking(prompt, completion)
    texts = [] if text is None else variants(text) if loose else [text]
    texts = [each for each in texts if each.strip()]
    kept = [any(keeps(each, name, arguments) for each in texts) for name, arguments in constraints]
    share = sum(kept) / len(kept)
    broken = [name for (name, _), each in zip(constraints, kept, strict=True) if not each]
    evidence = {"parsed": brief(text or "")} | ({"broken": brief(", ".join(broken), 200)} if broken else {})
    return Verdict(share if mode == "fraction" else float(share == 1), share == 1, evidence=evidence)


@lru_cache(maxsize=64)  # a group's completions share them
def read_constraints(answer: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        tables = json.loads(answer)
        constraints = [pair for table in (tables if isinstance(tables, list) else [tables]) for pair in _pairs(table)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the answer {brief(answer)!r} holds no constraints: {error!r}") from error
    for name, _ in constraints:
        if name not in CHECKS:
            raise ValueError(f"unknown constraint {name!r}: allowed are {', '.join(CHECKS)}")
    if not constraints:
        raise ValueError("no constraints")
    return constraints


def _pairs(table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    names = table["instruction_id"] if "instruction_id" in table else table["instruction_id_list"]
    names = [names] if isinstance(names, str) else names
    tables = table.get("kwargs") or [{}] * len(names)
    tables = [tables] if isinstance(tables, dict) else tables
    return [(name, each or {}) for name, each in zip(names, tables, strict=True)]


def variants(text: str) -> list[str]:
    """`text` without its first line, its last, both, and all of these without asterisks."""
    lines = text.split("\n")
    cut = ["\n".join(each).strip() for each in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return [text, *cut, *(each.replace("*", "") for each in cut)]


def keeps(text: str, name: str, arguments: dict[str, Any]) -> bool:
    """Whether `text` keeps to one constraint; arguments that are None, as in tables of fixed columns, do not count."""
    try:
        return CHECKS[name](text, **{key: value for key, value in arguments.items() if value is not None})
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


# ---- the constraints -------------------------------------------------------------------------------------------


def related(count: int, relation: str, number: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation = {relation!r}: allowed are at least, less than")
    return count >= number if relation == "at least" else count < number


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def sentences(text: str) -> list[str]:
    """Parts that end with a full stop, question or exclamation mark before white space, or with a paragraph; the stops
    of abbreviations, initials and numbers end none."""
    text = ABBREVIATION.sub(r"\1", text)
    parts = re.split(r"(?<=[.!?])[\"')\]]*\s+|\n{2,}", text)
    return [part for part in parts if re.search(r"\w", part)]


def paragraphs(text: str, divider: str) -> list[str]:
    """The parts that `divider` parts, an empty one before or after left out."""
    parts = [part.strip() for part in re.split(divider, text)]
    return parts[not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]


def holds(text: str, phrase: str) -> bool:
    return re.search(re.escape(phrase), text, re.IGNORECASE) is not None


def has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return related(len(re.findall(re.escape(keyword), text, re.IGNORECASE)), relation, frequency)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return related(text.lower().count(letter.lower()), let_relation, let_frequency)


def in_language(text: str, *, language: str) -> bool:
    return LANGUAGES.classify(text)[0] == language.split("-")[0].lower()


def foreign(text: str) -> bool:
    """Whether `text` is surely not English."""
    language, share = LANGUAGES.classify(text)
    return language != "en" and share > SURE


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    parts = paragraphs(text, r"\s?\*\*\*\s?")
    return len(parts) == num_paragraphs and all(parts)


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part for part in re.split(r"\n\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = re.match(r"\s*[\"'(]*([^\s.,?!'\")]+)", parts[nth_paragraph - 1])
    return first is not None and first[1].lower() == first_word.lower()


def postscript(text: str, *, postscript_marker: str) -> bool:
    marker = r"\s*".join(map(re.escape, re.sub(r"\s", "", postscript_marker)))
    return re.search(rf"\s*{marker}", text, re.IGNORECASE) is not None


def bullets(text: str) -> int:
    return len(re.findall(r"^\s*(?:\*[^\*]|-)[^\n]*$", text, re.MULTILINE))


def constrained(text: str) -> bool:
    return any(f"My answer is {choice}." in text for choice in ("yes", "no", "maybe"))


def highlights(text: str) -> int:
    doubled = re.findall(r"\*\*([^\n*]*)\*\*", text)
    single = re.findall(r"\*([^\n*]*)\*", re.sub(r"\*\*([^\n*]*)\*\*", "", text))
    return sum(bool(part.strip()) for part in [*doubled, *single])


def sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)) >= num_sections


def is_json(text: str) -> bool:
    inside = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        json.loads(inside[1] if inside else text, parse_constant=int)  # which refuses NaN
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n]+?)>>", text))


def two_responses(text: str) -> bool:
    parts = paragraphs(text, r"\*{6}")
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeats(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quoted(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


def capital_words(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return related(sum(word.isupper() for word in words(text)), capital_relation, capital_frequency)


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, *, keywords: all(holds(text, word) for word in keywords),
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": lambda text, *, forbidden_words: not any(has_word(text, w) for w in forbidden_words),
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": in_language,
    "length_constraints:number_sentences": lambda text, *, num_sentences, relation: related(
        len(sentences(text)), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": lambda text, *, num_words, relation: related(
        len(words(text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": lambda text, *, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": lambda text, *, num_bullets: bullets(text) == num_bullets,
    "detectable_format:constrained_response": constrained,
    "detectable_format:number_highlighted_sections": lambda text, *, num_highlights: highlights(text) >= num_highlights,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeats,
    "startend:end_checker": ends_with,
    "startend:quotation": quoted,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": lambda text: text.isupper() and not foreign(text),
    "change_case:english_lowercase": lambda text: text.islower() and not foreign(text),
    "punctuation:no_comma": lambda text: "," not in text,
}
