import asyncio

import pytest

from rewards.table import load, resolve, waits
from rewards.verdict import Segment, Verdict, brief

CHAIN = {"task": "chain_sum", "options": {"seed": 5, "size": 10, "min_terms": 2, "max_terms": 2}, "index": 3}


def tolerant(prompt, completion, answer, *, tolerance=0.0, **fields):
    return abs(float(completion) - float(answer)) <= tolerance


def forgetful(prompt, completion, answer):
    return 1.0


def of_a_batch(completions, **fields):
    return [0.0 for _ in completions]


async def asked(prompt, completion, answer, *, score=1.0, **fields):
    await asyncio.sleep(0)
    return Verdict(score, False, segments=[Segment(2, score)], costs={"asked": 1.0})


class Counting:
    """A reward made once, that remembers."""

    def __init__(self, *, start=0):
        self.count = start

    def __call__(self, prompt, completion, answer, **fields):
        self.count += 1
        return float(self.count)


class Broken:
    def __init__(self):
        raise KeyError("weights")

    def __call__(self, prompt, completion, answer, **fields):
        return 0.0


def lost(prompt, completion, answer, **fields):
    return Verdict.failed("the judge gave no score", {"answer": "hm"})


def test_exact_ignores_white_space_around_only():
    reward = resolve("exact", {})
    assert reward("2+2=", " 4\n", "4") == Verdict(1.0, True, evidence={"parsed": "4", "expected": "4"})
    assert not reward("2+2=", "4 4", "44").solved
    assert not reward("2+2=", "4.", "4").solved


def test_format_matches_the_whole_completion():
    reward = resolve("format", {"pattern": r"<think>.*</think>\d+"})
    assert reward("", "<think>a\nb</think>12\n", "").score == 1.0
    assert reward("", "x <think>a</think>12", "").score == 0.0


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
        ("exakt", {}, "allowed are agreement, code, exact, format, "),
        ("exact", {"strip": True}, "^strip = True: no such option; allowed are none$"),
        ("format", {"patern": "x"}, r"^patern = 'x': no such option \(did you mean pattern\?\); allowed are pattern$"),
        ("format", {}, "^pattern: is required$"),
        ("format", {"pattern": "("}, r"^pattern = '\(': no regular expression: missing \)"),
        ("math", {"boxed_only": "yes"}, "^boxed_only = 'yes': Expected 'bool', got 'str'$"),
        ("agreement", {"parts": -1}, "^parts = -1: Expected 'int' >= 0$"),
        ("instructions", {"mode": "some"}, "^mode = 'some': allowed are fraction, all$"),
        (f"{__name__}:Broken", {}, "KeyError: 'weights'"),
        ("nowhere.at_all:reward", {}, "cannot import"),
        (f"{__name__}:missing", {}, "cannot import"),
        (f"{__name__}:CHAIN", {}, "not a callable"),
        (f"{__name__}:forgetful", {}, "must take all fields"),
        (f"{__name__}:of_a_batch", {}, r"must take \(prompt, completion, answer, \*\*fields\): too many positional"),
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


# ---- composition -----------------------------------------------------------------------------------------------


def term(reward, weight=1.0, **more):
    path = reward if reward in ("exact", "format") else f"{__name__}:{reward}"
    return {"reward": path, "weight": weight, **more}


BOXED = term("format", 0.25, options={"pattern": r"\[.*\]"})


def test_a_sum_weighs_its_terms_and_keeps_their_parts_and_evidence():
    reward = resolve("sum", {"terms": [term("exact"), BOXED]})
    verdict = reward("", "[4]", "[4]")
    assert (verdict.score, verdict.solved) == (1.25, True)
    assert verdict.parts == {"exact": 1.0, "format": 0.25}
    assert verdict.evidence == {"exact: parsed": "[4]", "exact: expected": "[4]", "format: parsed": "[4]"}
    assert reward("", "[5]", "[4]").parts == {"exact": 0.0, "format": 0.25}


def test_the_first_term_or_all_say_what_is_solved():
    first, every = (resolve("sum", {"terms": [term("exact"), BOXED], "solved": solved}) for solved in ("first", "all"))
    assert first("", "4", "4").solved and not every("", "4", "4").solved
    assert every("", "[4]", "[4]").solved and not first("", "[5]", "[4]").solved


def test_a_term_without_a_verdict_leaves_the_sum_without_one():
    verdict = resolve("sum", {"terms": [term("exact"), term("lost")]})("", "4", "4")
    assert verdict.error == f"{__name__}:lost: the judge gave no score"
    assert verdict.evidence[f"{__name__}:lost: answer"] == "hm"


def test_a_sum_waits_where_a_term_waits():
    reward = resolve("sum", {"terms": [term("exact"), term("asked", 2.0, options={"score": 0.5}, name="judge")]})
    assert waits(reward) and not waits(resolve("sum", {"terms": [term("exact")]}))
    verdict = asyncio.run(reward("", "4", "4"))
    assert (verdict.score, verdict.solved, verdict.parts) == (2.0, True, {"exact": 1.0, "judge": 1.0})
    assert verdict.segments == [Segment(2, 1.0)] and verdict.costs == {"asked": 1.0}


def test_the_same_reward_twice_needs_two_names():
    with pytest.raises(ValueError, match="no name twice; there are exact"):
        resolve("sum", {"terms": [term("exact"), term("exact")]})
    reward = resolve("sum", {"terms": [term("exact"), term("exact", 2.0, name="again")]})
    assert reward("", "4", "4").parts == {"exact": 1.0, "again": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^terms: is required$"),
        ({"terms": []}, "^terms: at least one is needed"),
        ({"terms": 3}, "^terms = 3: Expected a list, got 'int'$"),
        ({"terms": [{"weight": 3}]}, "^terms.0.reward: is required$"),
        ({"terms": [{"reward": "exakt"}]}, "^terms.0.reward = 'exakt': unknown reward"),
        ({"terms": [{"reward": "exact", "wieght": 2}]}, r"^terms.0.wieght = 2: unknown \(did you mean weight\?\)"),
        ({"terms": [{"reward": "exact", "weight": float("nan")}]}, "^terms.0.weight = nan: "),
        ({"terms": [term("lost"), term("exact", options={"strip": 1})]}, "^terms.1.options.strip = 1: no such option"),
        ({"terms": [term("format")]}, "^terms.0.options.pattern: is required$"),
        ({"terms": [{"reward": "exact"}], "solved": "last"}, "^solved = 'last': allowed are first, all$"),
    ],
)
def test_a_sum_is_checked_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        resolve("sum", options)


def test_what_takes_options_alone_makes_a_reward_once():
    reward = resolve(f"{__name__}:Counting", {"start": 3})
    assert (reward("", "", ""), reward("", "", "")) == (4.0, 5.0)


def test_an_asynchronous_reward_takes_its_options():
    reward = resolve(f"{__name__}:asked", {"score": 0.25})
    assert waits(reward) and asyncio.run(reward("", "", "", score=1.0)).score == 0.25
