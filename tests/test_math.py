"""Answers of mathematics: found where they stand, and equal by value."""

import functools
import random
import time
from collections import Counter
from contextlib import closing

import pytest
from extent import THOROUGH

from rewards.answer import after_thinking, announced, boxed, tagged
from rewards.math import sane
from rewards.pool import Limits, Pool
from rewards.table import resolve
from rewards.worker import Task

MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"


def solved(completion: str, answer: str, prompt: str = "", **options: bool) -> bool:
    return resolve("math", options)(prompt, completion, answer).solved


# ---- where the answer stands -----------------------------------------------------------------------------------


def test_only_what_follows_the_last_thinking_block_counts():
    assert after_thinking("", "<think>4</think> 5") == " 5"
    assert after_thinking("", "<think>a</think> <think>b</think>5") == "5"
    assert after_thinking("", "<think>a</think> <reasoning>b</reasoning>5") == "5"
    assert after_thinking("", "5") == "5"
    assert after_thinking("Go. <think>\n", "still 4") is None
    assert after_thinking("Go. <think>\n", "it is 4</think>5") == "5"
    assert after_thinking("", "<think>a</think> 4 <think> no") is None
    assert not solved(r"<think>\boxed{4}</think> nothing", "4")
    assert solved(r"<think>\boxed{5}</think> \boxed{4}", "4")


def test_boxes_may_hold_braces_and_the_last_counts():
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}}") == [r"\frac{1}{2}"]
    assert boxed(r"\boxed{1}, $\boxed{2}$ and $\boxed{3}$") == ["1", "2", "3"]
    assert boxed(r"\boxed{0} so \boxed{\{1, \boxed{2}\}}") == [r"\{1, \boxed{2}\}"]
    assert boxed(r"\boxed{1} and \boxed{2") == ["1"]
    assert boxed("none") == []


def test_answers_may_be_announced():
    assert announced("The answer is 3.\nFinal answer: $x^2$.") == "$x^2$"
    assert announced("so\n#### 72") == "72"
    assert announced("**Answer:** 7") == "7"
    assert announced("nothing") is None
    assert tagged("<answer>1</answer> no, <answer> 2\n</answer>") == "2"


def test_a_box_comes_before_a_line_and_a_line_before_the_last_value():
    assert solved("Answer: 3\n" r"\boxed{4}" "\nAnswer: 5", "4")
    assert solved("Answer: 4\nI tried 17 ways", "4")
    assert solved("17 ways, all give 4", "4") and not solved("17 ways, all give 4", "17")
    assert not solved("Answer: 4", "4", boxed_only=True)


# ---- equality --------------------------------------------------------------------------------------------------

EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\dfrac{2}{4}"),
    ("1000", "1,000"),
    ("12", "12.0"),
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"50\%", "0.5"),
    (r"50\%", "50"),
    ("1+x", "x+1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("3", "x=3"),
    (r"10^{-3}", "0.001"),
    (r"\{1,2,3\}", r"\{3,1,2\}"),
    ("[1,2)", "[1, 2)"),
    (r"(-\infty,3)\cup(5,\infty)", r"(5,\infty)\cup(-\infty,3)"),
    (r"\pm 2", "-2, 2"),
    (MATRIX, MATRIX.replace("pmatrix", "bmatrix")),
    (r"90^\circ", "90"),
    (r"5\text{ cm}", "5"),
    (r"5\text{ m}", r"500\text{ cm}"),
    (r"5\text{ m}", "5 meters"),
    (r"2\text{ m}^2", r"20000\text{ cm}^2"),
    (r"1.5\text{ hours}", r"90\text{ minutes}"),
    (r"\text{yes}", "yes"),
    ("B", "B"),
    ("B", r"\text{(B)}"),
    ("(C)", "C. because"),
    ("B", r"\textbf{(B)}\ 12"),
    ("B", "option B"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"\frac16", r"0.1\overline{6}"),
    ("1000", "1e3"),
    ("3/2", "1 1/2"),
    ("1234", r"1\,234"),
    (r"\emptyset", r"\varnothing"),
    ("1, 2", "1 and 2"),
    ("1, 2", r"1 \text{ or } 2"),
    (r"[0,\infty)", r"x \ge 0"),
    ("(0,1)", "0<x<1"),
    (r"\{(1,2),(3,4)\}", "(3,4),(1,2)"),
    ("5", r"\text{The answer is }5"),
    ("6", r"6\text{ where }x=5"),
    ("5", r"5.\\"),
    (r"\leq 5", "≤ 5"),
    (r"\frac12", "½"),
    (r"x^2+\sqrt{2}", "x²+√2"),
    ("True", r"\text{true}"),
    (r"36\text{ km/h}", "10 m/s"),
    ("60 mph", "60 miles per hour"),
    (r"10\text{ m/s}^2", r"1000\,\mathrm{cm/s^2}"),
    ("5", "5 m/s"),
    ("c + d", "c + d"),
    ("$1+x$", "x+1"),
    (r"$x \ge 2$", r"[2,\infty)"),
    (r"$\le 2$", r"\leq 2"),
    ("3x + s", "3x + s"),
]
DIFFERENT = [
    (r"\frac{1}{2}", "0.51"),
    ("[1,2)", "[1,2]"),
    ("(1,2)", "[1,2]"),
    (r"\{1,2,3\}", r"\{1,2\}"),
    (MATRIX, MATRIX.replace("4", "5")),
    (r"5\text{ km}", r"5\text{ cm}"),
    (r"5\text{ m}", r"5\text{ m}^2"),
    (r"5\text{ m}", r"5\text{ s}"),
    (r"\text{yes}", r"\text{no}"),
    (r"50\%", r"5\%"),
    ("x+1", "x-1"),
    ("B", "C"),
    ("B", "Box"),
    ("A", "A, B"),
    ("A", r"\text{A and B}"),
    ("B", r"\text{(A)}, \text{(B)}"),
    ("A", "A^2"),
    ("A", "not A"),
    ("5", "not 5"),
    ("5", r"\le 5"),
    ("5", "x \\ne 5"),
    ("> 5", "< 5"),
    ("(1,2)", r"\{1,2\}"),
    (r"\{1,2\}", "(1,2)"),
    ("(1,2)", "(2,1)"),
    (r"[0,\infty)", "x > 0"),
    ("5", r"6\text{ where }x=5"),
    ("6", r"5 \text{ or } 6"),
    (r"0.\overline{3}", "0.3"),
    ("101_2", "101_3"),
    ("0.0000001", "0.0000002"),
    ("123456789012345678", "123456789012345679"),
    (r"\text{east}", "eats"),
    (r"10\text{ m/s}", "10 km/h"),
    (r"5\text{ m/s}", "5 m"),
    ("60 mph", "60 km/h"),
    ("1", ""),
    ("1", r"\{\{\{"),
]


@pytest.mark.parametrize(("answer", "given"), EQUAL)
def test_equal(answer, given):
    assert solved(rf"So $\boxed{{{given}}}$.", answer)


@pytest.mark.parametrize(("answer", "given"), DIFFERENT)
def test_different(answer, given):
    assert not solved(rf"So $\boxed{{{given}}}$.", answer)


def test_several_boxes_are_one_set():
    assert solved(r"\boxed{3} or \boxed{4}", "3, 4")
    assert not solved(r"\boxed{3} or \boxed{4}", "4")


@pytest.mark.parametrize(
    "line",
    [
        "The answer is (B).",
        "Answer: **B**",
        "Final answer: B) twelve",
        "#### B",
        "**B**",
        "Answer: b",
        "The answer is B because A is too small",
        "A is wrong. So the correct option is B",
        "Option A is wrong, so I take choice (B).",
    ],
)
def test_a_choice_is_a_letter(line):
    assert solved(line, "B") and not solved(line, "A")


@pytest.mark.parametrize(
    "line", ["The answer is a prime number.", "A nice day", "The answer is A or B", "Answer: A B C D", "ABCD"]
)
def test_an_article_and_a_list_are_no_choice(line):
    assert not any(solved(line, letter) for letter in "ABCD")


def test_a_letter_is_no_choice_where_choices_are_off():
    assert solved(r"\boxed{B) 3x}", "B") and not solved(r"\boxed{B) 3x}", "B", choices=False)


@pytest.mark.parametrize("answer", ["#### 72", r"thus \boxed{72}", "$72$", "72"])
def test_the_reference_may_be_a_whole_solution(answer):
    assert solved(r"\boxed{72}", answer)


def test_evidence_says_what_was_read():
    verdict = resolve("math", {})("", r"\boxed{\frac{1}{3}}", "1/2")
    assert verdict.evidence == {"parsed": r"\frac{1}{3}", "expected": "1/2"}


def test_what_is_endless_or_torn_is_not_parsed():
    assert sane(r"\frac{1}{2}") and sane("[1,2)") and sane("(" * 20 + "x") and sane("x" * 1000)
    assert not any(map(sane, ["(" * 21 + "x", "x" * 1001, "{", "}", "}{", "{{}"]))


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 20_000, "answer is" + " " * 100_000, "A" + " $" * 50_000, " " * 1000 + "x", r"\text{ " * 140]
)
def test_answers_are_found_in_hostile_text_in_no_time(text):
    begin = time.process_time()
    assert not solved(text, "5") and not solved(text, "B")
    assert time.process_time() - begin < 1.0


# ---- what a model may write ------------------------------------------------------------------------------------


def adversarial(count: int) -> list[str]:
    """Expressions that take for ever, nest for ever, are no mathematics or nothing at all."""
    rng = random.Random(7)
    number = functools.partial(rng.randrange, 2, 99)
    makers = [
        lambda: "^{".join(str(number()) for _ in range(rng.randrange(2, 6))) + "}" * 4,
        lambda: f"{number()}^{{{10 ** rng.randrange(3, 12)}}}",
        lambda: f"{10 ** rng.randrange(2, 9)}!" + "!" * rng.randrange(3),
        lambda: r"\frac{1}{" * (depth := rng.choice([5, 50, 90])) + "2" + "}" * depth,
        lambda: "(" * rng.randrange(1, 400) + "x" + ")" * rng.randrange(1, 400),
        lambda: r"\sqrt{" * rng.randrange(1, 120) + "2",
        lambda: "{" * rng.randrange(1, 900),
        lambda: "".join(map(chr, rng.choices([*range(1, 0xD7FF), *range(0xE000, 0x10FFFF)], k=40))),
        lambda: rng.choice(["", " ", "$", "$$", "\\", "{}", r"\boxed", "\0", "%", "=", "-", "∞", "½", "٣", "𝟗"]),
        lambda: "+".join(f"x_{{{i}}}^{{{number()}}}" for i in range(rng.randrange(1, 60))),
        lambda: f"(x+{number()})^{{{10 ** rng.randrange(1, 7)}}}",
        lambda: r"\sum_{n=1}^{" + str(10 ** rng.randrange(2, 10)) + r"} \frac{1}{n^" + str(number()) + "}",
        lambda: r"\int_0^{\infty} e^{-x^{" + str(number()) + r"}} \sin(x^x) dx",
        lambda: r"\lim_{x\to 0} \frac{\sin x^{" + str(number()) + "}}{x}",
        lambda: "9" * rng.choice([10, 300, 5000, 100_000]),
        lambda: r"\begin{pmatrix}" + r"\\".join("&".join(["1"] * 12) for _ in range(12)) + r"\end{pmatrix}^{" + "99}",
        lambda: ",".join(str(number()) for _ in range(rng.randrange(2, 300))),
        lambda: f"x^{{{number()}}}-x^{{{number()}}}=0",
        lambda: f"__import__('os').system('exit {number()}')",
    ]
    return [rng.choice(makers)() for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000 if THOROUGH else 120])
def test_no_expression_hangs_or_goes_unanswered(count):
    """Each gets a verdict within its deadline, and none of them counts as right."""
    texts, found, started = adversarial(count), {}, time.monotonic()
    with closing(Pool({"math": ("math", {})}, 2, Limits(reward_s=0.4))) as pool:
        for key, text in enumerate(texts):
            answer = [r"\frac{12345}{6789}", "x^{3}+1.5", r"\{1,5\}"][key % 3]
            pool.submit(key, Task("math", "?", answer, {}, [[rf"\boxed{{{text}}}", text][key % 2]]))
        while len(found) < count and time.monotonic() - started < count:
            found.update(pool.poll(0.1))
    assert len(found) == count
    assert not [texts[key] for key, verdicts in found.items() if any(each.solved for each in verdicts)]
    errors = Counter(each.error for verdicts in found.values() for each in verdicts)
    assert set(errors) <= {"", "no word within 0.4 s (signal 9)"} and errors[""] > count / 4, errors


@pytest.mark.parametrize("inside", ["42", "\n$42$\n", "x = 42", "so \\boxed{42}"])
def test_an_answer_between_tags_is_found(inside):
    equals = resolve("math", {})
    assert equals("", f"<think>7</think> first 5, then <answer>{inside}</answer>", "42").solved
    assert not equals("", f"<think>42</think> 42, no <answer>{inside.replace('42', '41')}</answer>", "42").solved
