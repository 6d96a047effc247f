"""What does the sandbox cost? python bench/sandbox.py [--quick]

Programs judged a second by two processes on two cores: by the reward `code`, and by running each test in a bare
subprocess of the same Python (or g++ and the program that it makes), with no walls and no bounds.

one test      a program that adds numbers from standard input
ten tests     the same program; the bare way starts ten subprocesses
a function    called with ten lists of arguments; the bare way calls it ten times in one subprocess
untidy        one test, and the program leaves a folder behind, so that every program gets a new sandbox
hanging       one test; one program in twenty never ends, and is given a second
C++           compiled, then one test
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from rewards.code.trial import COMPILERS  # noqa: E402
from rewards.sandbox import bubblewrap  # noqa: E402
from rewards.table import Reward, resolve  # noqa: E402

NUM_PROCESSES = 2
GOAL = 0.5
TIME_S = {"python": 1.0, "cpp": 10.0}  # of one test
PYTHON = [*bubblewrap.python(), "-c"]

ADDING = "import sys\nprint(sum(map(int, sys.stdin.read().split())))\n"
UNTIDY = "import os\nos.mkdir('left')\n" + ADDING
HANGING = "while True:\n    pass\n"
FUNCTION = "def largest(numbers):\n    return max(numbers)\n"
CALLING = "import json, sys\nfor line in sys.stdin:\n    print(json.dumps(largest(*json.loads(line))))\n"
CPP = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }\n"


@dataclass(frozen=True)
class Case:
    """Programs of one kind, each with `num_tests` tests."""

    name: str
    programs: tuple[str, ...]
    num_tests: int = 1
    function: str = ""
    language: str = "python"
    num_programs: int = 200

    def texts(self) -> tuple[list[str], list[str]]:
        """Inputs and outputs."""
        pairs = [(f"{number} {number + 1}\n", f"{2 * number + 1}\n") for number in range(self.num_tests)]
        return [given for given, _ in pairs], [expected for _, expected in pairs]

    def arguments(self) -> tuple[list[list[list[int]]], list[int]]:
        return [[[number, 2, 3]] for number in range(self.num_tests)], [
            max(number, 3) for number in range(self.num_tests)
        ]

    def program(self, number: int) -> str:
        return self.programs[number % len(self.programs)]


CASES = [
    Case("one test", (ADDING,), num_programs=400),
    Case("ten tests", (ADDING,), num_tests=10, num_programs=60),
    Case("a function", (FUNCTION,), num_tests=10, function="largest"),
    Case("untidy", (UNTIDY,), num_programs=100),
    Case("hanging", (*[ADDING] * 19, HANGING), num_programs=100),
    Case("C++", (CPP,), language="cpp", num_programs=8),
]


@cache
def reward(language: str) -> Reward:
    return resolve("code", {"language": language, "time_s": TIME_S[language], "total_s": 30.0})


def judge(case: Case, number: int) -> bool:
    """By the reward."""
    given, expected = case.arguments() if case.function else case.texts()
    tests = {"inputs": given, "outputs": expected, "fn_name": case.function}
    completion = f"```{case.language}\n{case.program(number)}```"
    return reward(case.language)("", completion, "", input_output=json.dumps(tests)).solved


def judge_bare(case: Case, number: int) -> bool:
    """By subprocesses, compared word by word."""
    program = case.program(number)
    if case.function:
        given, expected = case.arguments()
        calls = "".join(json.dumps(arguments) + "\n" for arguments in given)
        return run([*PYTHON, program + CALLING], calls).split() == [str(value) for value in expected]
    with TemporaryDirectory() as folder, chdir(folder):
        command = [*PYTHON, program]
        if case.language == "cpp":
            command = [f"{folder}/main"]
            subprocess.run([*COMPILERS["cpp"][:-1], *command], input=program, text=True, check=True)
        return all(
            run(command, given).split() == expected.split() for given, expected in zip(*case.texts(), strict=True)
        )


def run(command: list[str], given: str) -> str:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=TIME_S["python"]).stdout
    except subprocess.TimeoutExpired:
        return ""


def speed(pool: ProcessPoolExecutor, way: Callable[[Case, int], bool], case: Case, num_programs: int) -> float:
    """Programs a second. Every program that can end is right."""
    begin = time.perf_counter()
    solved = list(pool.map(way, [case] * num_programs, range(num_programs)))
    taken_s = time.perf_counter() - begin
    assert solved == [case.program(number) != HANGING for number in range(num_programs)], case.name
    return num_programs / taken_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer programs, one round")
    quick = parser.parse_args().quick
    rows = []
    with ProcessPoolExecutor(NUM_PROCESSES, get_context("spawn")) as pool:
        for case in CASES:
            num_programs = max(2 * NUM_PROCESSES, case.num_programs // 4) if quick else case.num_programs
            for way in (judge, judge_bare):
                speed(pool, way, case, 2 * NUM_PROCESSES)
            rounds = [
                [speed(pool, way, case, num_programs) for way in (judge, judge_bare)] for _ in range(1 if quick else 3)
            ]
            ours, bare = map(list, zip(*rounds, strict=True))
            rows.append(results.row(case.name, "programs/s", ours, bare, "bare subprocesses", GOAL))
    results.keep("sandbox", "cpu", rows)


if __name__ == "__main__":
    main()
