import re

import pytest

from rewards.table import load, resolve
from rewards.verdict import Verdict, brief

CHAIN = {"task": "chain_sum", "options": {"seed": 5, "size": 10, "min_terms": 2, "max_terms": 2}, "index": 3}


def tolerant(prompt, completion, answer, *, tolerance=0.0, **fields):
    return abs(float(completion) - float(answer)) <= tolerance


def forgetful(prompt, completion, answer):
    return 1.0


def test_exact_ignores_white_space_around_only():
    reward = resolve("exact", {})
    assert reward("2+2=", " 4\n", "4") == Verdict(1.0, True, evidence={"parsed": "4", "expected": "4"})
    assert not reward("2+2=", "4 4", "44").solved
    assert not reward("2+2=", "4.", "4").solved


def test_format_matches_the_whole_completion():
    reward = resolve("format", {"pattern": r"<think>.*</think>\d+"})
    assert reward("", "<think>a\nb</think>12\n", "").score == 1.0
    assert reward("", "x <think>a</think>12", "").score == 0.0
    with pytest.raises(re.error):
        resolve("format", {"pattern": "("})("", "", "")


@pytest.mark.parametrize(
    ("completion", "answer", "solved"),
    [
        ("It is $\\frac{2}{4}$, so \\boxed{0.5}", "\\frac{1}{2}", True),
        ("first 3, then \\boxed{4}", "4", True),
        ("\\boxed{3} or \\boxed{4}", "4", False),
        ("the answer is 1,000", "1000", True),
        ("\\boxed{x+1}", "$1+x$", True),
        ("\\boxed{0.51}", "\\frac{1}{2}", False),
        ("no idea", "7", False),
    ],
)
def test_math_compares_values(completion, answer, solved):
    assert resolve("math", {})("", completion, answer).solved is solved


def test_math_refuses_an_answer_that_is_none():
    with pytest.raises(ValueError, match="no mathematics"):
        resolve("math", {})("", "1", "")


def test_reasoning_gym_scores_with_its_own_scorer():
    from rewards.logic import entry

    answer = entry(**CHAIN)["answer"]
    reward = resolve("reasoning_gym", {})
    assert reward("", answer, answer, **CHAIN, other=1).solved
    assert reward("", f" 0{answer}.00", answer, **CHAIN).solved  # this task forgives leading zeros and decimals
    assert reward("", f"{int(answer) + 1}", answer, **CHAIN).score < 1.0
    assert reward("", f"so <answer>1</answer> no <answer>{answer}</answer>.", answer, **CHAIN).solved


def test_reasoning_gym_judges_by_the_entry_not_by_the_answer():
    other = {**CHAIN, "index": 4}
    from rewards.logic import entry

    assert not resolve("reasoning_gym", {})("", entry(**CHAIN)["answer"], entry(**CHAIN)["answer"], **other).solved


def test_a_reward_by_import_path_takes_its_options():
    assert resolve(f"{__name__}:tolerant", {"tolerance": 0.5})("", "1.4", "1", column=3) is True
    assert resolve(f"{__name__}:tolerant", {})("", "1.4", "1") is False


def test_an_option_wins_over_a_field_of_the_same_name():
    assert resolve(f"{__name__}:tolerant", {"tolerance": 0.5})("", "1.4", "1", tolerance=0.0) is True


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exakt", {}, "allowed are exact, format, math, reasoning_gym"),
        ("exact", {"strip": True}, "no option 'strip': allowed are none"),
        ("format", {"patern": "x"}, "no option 'patern': allowed are pattern"),
        ("nowhere.at_all:reward", {}, "cannot import"),
        (f"{__name__}:missing", {}, "cannot import"),
        (f"{__name__}:CHAIN", {}, "not a callable"),
        (f"{__name__}:forgetful", {}, "must take all fields"),
    ],
)
def test_what_cannot_be_resolved_says_what_is_allowed(name, options, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, options)


def test_load_finds_what_the_path_names():
    assert load(f"{__name__}:tolerant")("", "1", "1")


def test_numbers_become_verdicts():
    assert Verdict.of(0.5) == Verdict(0.5, False)
    assert Verdict.of(True) == Verdict(1.0, True)


def test_brief_keeps_the_ledger_small():
    assert brief("x" * 80) == "x" * 80
    assert brief("x" * 81) == "x" * 79 + "…"
