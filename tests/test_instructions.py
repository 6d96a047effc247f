"""The constraints of IFEval: for each family texts that keep to it and texts that do not."""

import json
from typing import Any

import pytest

from rewards.instructions import CHECKS, keeps, sentences
from rewards.table import resolve

ENGLISH = "The river runs quietly past the old mill and nobody in the village remembers who built it."
GERMAN = "Der Fluss fließt still an der alten Mühle vorbei und niemand im Dorf weiß noch, wer sie gebaut hat."

# Constraint, arguments, texts that keep to it, texts that break it.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["Mill", "old"]}, [ENGLISH], ["An old house."]),
    (
        "keywords:frequency",
        {"keyword": "la", "frequency": 2, "relation": "at least"},
        ["La la land"],
        ["La"],
    ),
    (
        "keywords:frequency",
        {"keyword": "la", "frequency": 2, "relation": "less than"},
        ["La", "none"],
        ["La la"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["old"]}, ["A golden one"], ["An Old one."]),
    ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, ["C or C+"], ["I like c++."]),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": "at least"},
        ["Even eve"],
        ["even"],
    ),
    ("language:response_language", {"language": "de"}, [GERMAN], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two!", "A first line\n\nA second"],
        ["Mr. Smith paid 3.50 at 5 p.m.", "e.g. Smith Inc. paid at 5 p.m. today, etc. etc."],
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "a *** b ***"], ["a", "a***b***c"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one, two"], ["one two three"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        ["First.\n\nThen, more."],
        ["First.\n\nAnd then.", "Then.\n\nFirst.", "a\n\nthen\n\nb"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name], [date]"], ["[name]", "none"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S more"], ["Bye.\nP.S. more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\np. s. more"], ["Bye."]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "x:\n- a\n- b"], ["* a", "**a**\n* b"]),
    ("detectable_format:constrained_response", {}, ["My answer is maybe."], ["Maybe.", "My answer is perhaps."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b**", "*a* *b*"],
        ["*a* and b", "** ** *a*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1 Section 2"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["{a: 1}", "text {}", "NaN"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<A title>", "<< >> text"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a\n******\na", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. It."], ["It. Say it."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So it was. the end.\n"], ["The end. Or not"]),
    ("startend:quotation", {}, ['"all of it"'], ['"half" of it', '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and ESA"],
        ["NASA and Esa"],
    ),
    ("change_case:english_capital", {}, ["ALL OF IT, 3!", "AB CD"], ["ALL of IT", GERMAN.upper()]),
    ("change_case:english_lowercase", {}, ["all of it, 3!", "ab cd"], ["all of It", GERMAN.lower()]),
    ("punctuation:no_comma", {}, ["no such thing"], ["one, two"]),
]


@pytest.mark.parametrize(("name", "arguments", "kept", "broken"), CASES)
def test_constraint(name, arguments, kept, broken):
    assert [keeps(text, name, arguments) for text in kept] == [True] * len(kept)
    assert [keeps(text, name, arguments) for text in broken] == [False] * len(broken)


def test_every_constraint_is_tested():
    assert {name for name, *_ in CASES} == set(CHECKS) and len(CHECKS) == 25


def test_sentences_do_not_end_at_abbreviations():
    assert len(sentences('Dr. A. Smith vs. Mr. B. "saw 3.5 of them." Did he? Yes!')) == 3


FIELDS = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"num_words": 3, "relation": "less than", "letter": None}],
}


def test_score_is_the_share_and_solved_means_all():
    reward = resolve("instructions", {})
    assert reward("", "one two", "", **FIELDS).score == 1.0
    verdict = reward("", "one two three", "", **FIELDS)
    assert (verdict.score, verdict.solved) == (0.5, False)
    assert verdict.evidence == {"parsed": "one two three", "broken": "length_constraints:number_words"}
    strict = resolve("instructions", {"mode": "all"})
    assert strict("", "one two three", "", **FIELDS).score == 0.0 and strict("", "one two", "", **FIELDS).solved


def test_only_what_follows_the_thinking_is_judged_and_silence_keeps_to_nothing():
    reward = resolve("instructions", {})
    assert reward("", "<think>a, b, c, d</think>one two", "", **FIELDS).solved
    assert reward("", "<think>one two", "", **FIELDS).score == 0.0
    assert reward("", " ", "", **FIELDS).score == 0.0


def test_loose_forgives_an_introduction_and_asterisks():
    strict, loose = resolve("instructions", {}), resolve("instructions", {"loose": True})
    text = "Sure, here it is:\n**one two**"
    assert not strict("", text, "", **FIELDS).solved
    assert loose("", text, "", **FIELDS).solved
    assert loose("", "one two\nI hope, this helps.", "", **FIELDS).solved
    assert loose("", "Sure, here it is:\none two\nI hope, this helps.", "", **FIELDS).solved
    assert not loose("", "one, two\nthree, four, five\nsix, seven", "", **FIELDS).solved


@pytest.mark.parametrize(
    "answer",
    [
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
        [{"instruction_id": ["punctuation:no_comma"], "kwargs": [{}]}],
        [{"instruction_id": "punctuation:no_comma"}],
    ],
)
def test_constraints_may_stand_in_the_answer(answer):
    reward = resolve("instructions", {})
    assert reward("", "none", json.dumps(answer)).solved and not reward("", "a, b", json.dumps(answer)).solved


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "holds no constraints"),
        ("[]", "no constraints"),
        ('[{"instruction_id": ["punctuation:no_coma"]}]', "unknown constraint 'punctuation:no_coma'"),
        ('[{"instruction_id": ["startend:end_checker"]}]', "startend:end_checker: .*missing"),
        ('[{"instruction_id": ["a", "b"], "kwargs": [{}]}]', "holds no constraints"),
    ],
)
def test_constraints_that_are_none_are_named(answer, message):
    with pytest.raises(ValueError, match=message):
        resolve("instructions", {})("", "text", answer)
