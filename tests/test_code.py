"""The reward `code`: formats, languages, comparison. Every format has right and wrong completions."""

import base64
import json
import pickle
import time
import zlib

import pytest

from rewards.code.comparison import TEXTS, values
from rewards.code.completion import program
from rewards.code.formats import problem
from rewards.table import resolve

SUMS = {"input_output": json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})}


@pytest.fixture(scope="module")
def code():
    return resolve("code", {"time_s": 1.0, "total_s": 6.0})


@pytest.fixture(scope="module")
def cpp():
    return resolve("code", {"language": "cpp", "time_s": 1.0, "total_s": 60.0})


def fenced(source, tag="python"):
    return f"<think>Hm.</think>\nThis is it:\n```{tag}\n{source}\n```\nDone."


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


LIVE_TEXT = {
    "public_test_cases": json.dumps([{"input": "2\n1 2\n", "output": "3", "testtype": "stdin"}]),
    "private_test_cases": packed([{"input": "3\n1 2 4\n", "output": "7", "testtype": "stdin"}]),
    "metadata": "{}",
}
LIVE_CALL = {
    "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]),
    "private_test_cases": packed([{"input": "[]\n1", "output": "[]", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "shift"}),
}
APPS_CALL = {"input_output": {"fn_name": "f", "inputs": [[1, "a"], [2, "b"]], "outputs": ["a", ["bb"]]}}
HUMAN = {
    "prelude": "def encode(s):\n    return s[::-1]\n\ndef decode(s: str):\n    '''Undoes encode.'''\n",
    "entry_point": "decode",
    "test": "def check(candidate):\n    for word in ('abc', ''):\n        assert candidate(encode(word)) == word\n",
}
LISTS = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next

def chain(items):
    head = None
    for item in reversed(items):
        head = ListNode(item, head)
    return head

def items(node):
    return [] if node is None else [node.val, *items(node.next)]
"""
REVERSED = """
def check(candidate):
    assert items(candidate(head=chain([1, 2, 3]))) == [3, 2, 1]
    assert candidate(None) is None
"""
LEET = {"prelude": LISTS, "entry_point": "Solution().reverse", "test": REVERSED}
REVERSE = """
class Solution:
    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:
        last = None
        while head:
            head.next, last, head = last, head, head.next
        return last
"""

SAMPLES = {
    "APPS, a program": (SUMS, "a, b = map(int, input().split())\nprint(a + b)", "print(3)"),
    "APPS, a function": (APPS_CALL, "def f(n, s):\n    return s * n", "def f(n, s):\n    return s + s"),
    "LiveCodeBench, a program": (LIVE_TEXT, "input()\nprint(sum(map(int, input().split())))", "print(3)"),
    "LiveCodeBench, a method": (
        LIVE_CALL,
        "class Solution:\n    def shift(self, xs: List[int], n: int) -> List[int]:\n        return [x + n for x in xs]",
        "class Solution:\n    def shift(self, xs, n):\n        return [x - n for x in xs]",
    ),
    "LiveCodeBench, a tuple": (
        LIVE_CALL,
        "def shift(xs, n): return tuple(x + n for x in xs)",
        "def shift(*_): return ()",
    ),
    "HumanEval": (HUMAN, "def decode(s: str):\n    return s[::-1]", "def decode(s):\n    return s"),
    "LeetCode, linked lists": (LEET, REVERSE, REVERSE.replace("return last", "return head")),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_right_passes_and_wrong_does_not(code, sample):
    tests, right, wrong = SAMPLES[sample]
    assert code("", fenced(right), "", **tests).score == 1.0
    verdict = code("", fenced(wrong), "", **tests)
    assert verdict.score == 0.0 and not verdict.solved and not verdict.error
    assert verdict.evidence["failed"].startswith("test ")


IN_PLACE = {
    "prelude": LISTS,
    "entry_point": "turn",
    "test": "def check(candidate):\n"
    "    numbers, head = [1, 2], chain([1, 2])\n"
    "    candidate(numbers, table := {'a': 1}, head=head)\n"
    "    assert (numbers, table, items(head)) == ([2, 1], {1: 'a'}, [2, 1])\n",
}
TURN = """
def turn(numbers, table, head):
    numbers.reverse()
    table[1] = 'a'
    del table['a']
    head.val, head.next.val = head.next.val, head.val
"""


def test_what_a_function_makes_of_its_arguments_is_seen(code):
    assert code("", fenced(TURN), "", **IN_PLACE).solved
    assert not code("", fenced(TURN.replace("numbers.reverse()", "pass")), "", **IN_PLACE).solved


def test_a_function_with_a_value_cannot_spoil_what_it_is_compared_with(code):
    tests = {"entry_point": "f", "test": "xs = [2, 1]\nassert f(xs) == sorted(xs)"}
    assert code("", fenced("def f(xs):\n    return sorted(xs)"), "", **tests).solved
    assert not code("", fenced("def f(xs):\n    xs.clear()\n    return []"), "", **tests).solved


def test_a_check_that_gives_what_is_no_data_cannot_be_run(code):
    tests = {"entry_point": "f", "test": "assert f(len) == 3"}
    with pytest.raises(ValueError, match="the test cannot be run: .*no data"):
        code("", fenced("def f(g):\n    return 3"), "", **tests)


def test_rows_as_their_data_sets_have_them(code):
    """LeetCodeDataset has two columns of tests; LiveCodeBench has null, TACO numbers; JSON's keys are texts."""
    both = LEET | {"input_output": [{"input": "head = [1,2,3]", "output": "[3,2,1]"}]}
    assert code("", fenced(REVERSE), "", **both).solved
    assert code("", fenced(SAMPLES["LiveCodeBench, a program"][1]), "", **LIVE_TEXT | {"metadata": "null"}).solved
    assert code("", fenced("print(input())"), "", input_output={"inputs": [1], "outputs": [1]}).solved
    keys = {"fn_name": "f", "inputs": [[1]], "outputs": [{"1": [2]}]}
    assert code("", fenced("def f(x):\n    return {x: (2,)}"), "", input_output=keys).solved
    assert not code("", fenced("def f(x):\n    return {x + 1: (2,)}"), "", input_output=keys).solved


def test_a_continuation_without_fences_follows_the_prelude(code):
    assert code("", "    return s[::-1]\n", "", **HUMAN).solved
    assert not code("", "    return s\n", "", **HUMAN).solved


def test_the_answer_may_hold_the_tests(code):
    assert code("", fenced("print(input())"), json.dumps({"inputs": ["x"], "outputs": ["x"]})).solved


def test_a_fraction_counts_all_tests():
    tests = {"input_output": {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "2", "3", "5"]}}
    verdict = resolve("code", {"grade": "fraction"})("", fenced("print(input())"), "", **tests)
    assert verdict.score == 0.75 and not verdict.solved
    assert verdict.evidence == {"failed": "test 4 of 4", "why": "wrong answer", "given": "4", "expected": "5"}


@pytest.mark.parametrize(
    ("source", "why", "errors"),
    [
        ("print(1", "exit code 1", "SyntaxError"),
        ("import nothing_like_it", "exit code 1", "ModuleNotFoundError"),
        ("print(3)\nraise SystemExit(2)", "exit code 2", ""),
        ("import os\nos.abort()", "signal 6", ""),
        ("while True: pass", "too slow", ""),
        ("import time; time.sleep(60)", "too slow", ""),
        ("print('3' * 10**6)", "wrong answer", ""),
    ],
)
def test_a_failure_says_why(code, source, why, errors):
    verdict = code("", fenced(source), "", **SUMS)
    assert verdict.score == 0.0 and verdict.evidence["why"] == why and errors in verdict.evidence.get("errors", "")


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.buffer.readline().split()))))",
        "print(sum(map(int, open(0).read().split())))",
        "print(sum(map(int, open('/dev/stdin').read().split())))",
        "import threading\ndef main(): print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()",
        "import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))",
        "if __name__ == '__main__':\n    print(sum(map(int, input().split())))\n    exit()",
        "import numpy as np\nprint(np.array(input().split(), int).sum())",
        "from dataclasses import *\n@dataclass\nclass P:\n    x: int\nprint(P(sum(map(int, input().split()))).x)",
        "import sys\nprint(sum(map(int, input().split())))\nsys.stdout.close()",
        "out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
        "import io, sys\nprint(sum(map(int, input().split())))\nsys.stdout = io.StringIO()\nprint('unseen')",
        "import asyncio\nasync def f(): print(sum(map(int, input().split())))\nasyncio.run(f())",
        "open('/tmp/x', 'w').write(input())\nprint(sum(map(int, open('/tmp/x').read().split())))",
    ],
)
def test_what_programs_do_works(code, source):
    assert code("", fenced(source), "", **SUMS).solved


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }", None),
        ("#include <iostream>\nint main() { std::cout << 3; }", "wrong answer"),
        ("#include <cstdlib>\nint main() { abort(); }", "signal 6"),
        ("#include <unistd.h>\n#include <cstdio>\nint main() { if (fork() >= 0) puts(\"3\"); }", "wrong answer"),
        ("int main() { for (;;) ; }", "too slow"),
        ("int main() { return x; }", "does not compile: exit code 1"),
        ("#include \"/dev/zero\"\nint main() {}", "does not compile: exit code 1"),
    ],
)  # fmt: skip
def test_cpp(cpp, source, why):
    verdict = cpp("", fenced(source, "cpp"), "", **SUMS)
    assert verdict.evidence.get("why") == why and verdict.solved == (why is None)


def multiple(given, output, expected):
    """Any multiple of the expected number but zero."""
    return int(output) % int(expected) == 0 and int(output) != 0


def test_a_checker_of_the_user_decides():
    reward = resolve("code", {"checker": f"{__name__}:multiple", "grade": "fraction"})
    assert reward("", fenced("print(21)"), "", **SUMS).score == 1.0
    assert reward("", fenced("print(14)"), "", **SUMS).score == 0.5


@pytest.mark.parametrize(
    ("checker", "output", "solved"),
    [
        ("def check(given, output, expected):\n    return sum(map(int, given.split())) == int(output)", "a + b", True),
        ("def check(given, output, expected):\n    return sum(map(int, given.split())) == int(output)", "a", False),
        ("def check(given, output, expected):\n    return int(output) > 0", "'none'", False),
        ("def check(given, output, expected):\n    while True: pass", "3", False),
    ],
)
def test_a_checker_of_the_data_decides(code, checker, output, solved):
    verdict = code("", fenced(f"a, b = map(int, input().split())\nprint({output})"), "", checker_code=checker, **SUMS)
    assert verdict.solved is solved


def test_of_an_answer_far_too_long_nothing_is_looked_at(code):
    anything = "def check(given, output, expected):\n    return True"
    assert code("", fenced("print('x')"), "", checker_code=anything, **SUMS).solved
    assert not code("", fenced("print('x' * 10**6)"), "", checker_code=anything, **SUMS).solved
    verdict = code("", fenced("def f(n, s):\n    return s * 10**6"), "", **APPS_CALL)
    assert verdict.evidence["given"] == "far too long"


def test_a_broken_checker_or_check_is_an_error(code):
    with pytest.raises(ValueError, match="SyntaxError"):
        code("", fenced("print(3)"), "", checker_code="def check(", **SUMS)
    with pytest.raises(ValueError, match="the test cannot be run: SyntaxError"):
        code("", fenced("def decode(s): return s"), "", **{**HUMAN, "test": "def check("})


def test_functions_are_for_python(cpp):
    with pytest.raises(ValueError, match="tests of functions are for Python, not for cpp"):
        cpp("", fenced("int f(int x) { return x; }", "cpp"), "", **APPS_CALL)


def test_large_inputs_and_preludes_fit(code):
    tests = {"inputs": ["1 " * (20 << 20)], "outputs": [str(20 << 20)]}
    assert code("", fenced("import sys\nprint(sys.stdin.read().count('1'))"), "", input_output=tests).solved
    assert code(
        "", "    return s[::-1]", "", **{**HUMAN, "prelude": "#" + "x" * 10**6 + "\n" + HUMAN["prelude"]}
    ).solved


def test_a_check_that_never_asks_does_not_pass(code):
    tests = {**HUMAN, "test": "def check(candidate):\n    pass"}
    assert not code("", fenced("def decode(s): return s"), "", **tests).solved


@pytest.mark.parametrize(
    ("answer", "fields", "message"),
    [
        ("", {}, "answer: these are no tests"),
        ('{"inputs": [], "outputs": []}', {}, "answer: there are no tests"),
        ("", {"input_output": '{"inputs": ["1"], "outputs": []}'}, "input_output: these are no tests"),
        ("", {"input_output": '{"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}'}, "no list of arguments"),
        ("", {"test": "assert f(1)"}, "test: these are no tests: ValueError: entry_point = None"),
        (
            "",
            {**LIVE_TEXT, "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()},
            "builtins.print",
        ),
    ],
)
def test_tests_that_are_none_are_refused(answer, fields, message):
    with pytest.raises(ValueError, match=message):
        problem(answer, fields)


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("```python\na\n```\nor\n```py\nb\n```", "b\n"),
        ("```python\na\n```\nwhich prints\n```\n3\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```cpp\na\n```", ""),
        ("1. So:\n   ```python\n   if a:\n     b\n   ```\n", "if a:\n  b\n"),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("<think>\n```python\na\n```\n", ""),
        ("```python\na\n", ""),
        ("a = 1", "a = 1"),
        ("```python\ns = '''\n  ``\n'''\n```", "s = '''\n  ``\n'''\n"),
    ],
)
def test_the_last_program_of_the_language_counts(completion, found):
    assert program(completion, "python") == found


@pytest.mark.parametrize(
    ("compare", "given", "expected", "tolerance", "right"),
    [
        ("lines", "1 2 \n3\n\n", "1 2\n3", 0.0, True),
        ("lines", "1 2 3", "1 2\n3", 0.0, False),
        ("lines", "1 2", "1 2\n3", 0.0, False),
        ("lines", "1 2\n3", "1 2", 0.0, False),
        ("words", "1 2 3", "1 2\n3", 0.0, True),
        ("exact", "1\n", "1", 0.0, False),
        ("lines", "1.0", "1", 0.0, True),
        ("lines", "1.01", "1", 0.0, False),
        ("lines", "1.01", "1", 0.02, True),
        ("lines", "nan", "1", 0.02, False),
        ("lines", "inf", "1", 0.02, False),
        ("lines", "1e999999999", "1", 0.0, False),
        ("lines", "yes", "YES", 0.0, False),
        ("lines", "", "1", 0.0, False),
        ("lines", "\n", "", 0.0, True),
        ("lines", "100000000000000000001", "100000000000000000000", 0.0, False),
    ],
)
def test_texts_are_compared(compare, given, expected, tolerance, right):
    assert TEXTS[compare](given, expected, tolerance) is right


@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "right"),
    [
        ([1, (2, 3)], [1, [2, 3]], 0.0, True),
        ([1, 2], [1, 2, 3], 0.0, False),
        ({"a": [0.1 + 0.2]}, {"a": [0.3]}, 0.0, False),
        ({"a": [0.1 + 0.2]}, {"a": [0.3]}, 1e-9, True),
        (4, 5, 1.0, False),
        ("1", 1, 0.0, False),
        (None, [], 0.0, False),
        (10**400, 1.0, 0.1, False),
        (True, 1, 0.0, True),
    ],
)
def test_values_are_compared(given, expected, tolerance, right):
    assert values(given, expected, tolerance) is right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "rust"}, "allowed are python, cpp"),
        ({"grade": "some"}, "allowed are all, fraction"),
        ({"compare": "no"}, "allowed are lines, words, exact"),
        ({"sandbox": "none"}, "allowed are bubblewrap, unsafe"),
        ({"checker": "nowhere:f"}, "^checker = 'nowhere:f': cannot import"),
        ({"time_s": 0}, "^time_s = 0: Expected 'float' > 0"),
        ({"times": 3}, "^times = 3: no such option"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        resolve("code", options)


def test_programs_are_found_in_hostile_text_in_no_time():
    for text in ("```" + "a" * 10**6, "```\n" * 10**5, " " * 10**6, ("```" + " " * 1000) * 1000, "`" * 10**6):
        begin = time.process_time()
        program(text, "python")
        assert time.process_time() - begin < 1.0
