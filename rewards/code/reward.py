"""The reward `code`: the program in a completion passes its tests."""

import shutil
from contextlib import closing
from typing import Any

from rewards.code import completion as completions
from rewards.code import formats
from rewards.code.comparison import TEXTS
from rewards.code.trial import COMPILERS, RAISED, Checker, Rules, Trial, call, sandbox
from rewards.sandbox.bubblewrap import SandboxError
from rewards.sandbox.files import opened, sealed
from rewards.sandbox.launch import WALLS
from rewards.sandbox.sandbox import Sandbox
from rewards.table import load
from rewards.verdict import Verdict

LONGEST_JUDGEMENT = 10_000  # bytes

CHOICES = {
    "language": tuple(completions.TAGS),
    "grade": ("all", "fraction"),
    "compare": tuple(TEXTS),
    "sandbox": tuple(WALLS),
}


class Code(Rules, kw_only=True, frozen=True):
    """1 where the program in a completion passes all its tests, else 0; with `grade = "fraction"`, the share of its
    tests that it passes. The tests come from the columns that `rewards.code.formats` lists.

    Standard output is compared by `compare` ("lines", "words" or "exact"), numbers within `tolerance`; or by `checker`,
    the import path of a function (input, output, expected) -> bool; or, in rows that have `checker_code`, by the
    function `check` of that source, which gets the same and runs in a sandbox too.

    One test may take `time_s` seconds of processor and `memory_mib`; all of them and the compiler take at most
    `total_s`, which is to be less than deadlines.reward_s. `sandbox = "unsafe"` runs programs without walls, with the
    rights of whoever trains. Raises `ValueError` for an option that is none and where there can be no sandbox.
    """

    grade: str = "all"
    checker: str = ""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} = {value!r}: allowed are {', '.join(allowed)}")
        if self.checker:
            try:
                load(self.checker)
            except ValueError as error:
                raise ValueError(f"checker = {self.checker!r}: {error}") from error
        if self.language in COMPILERS and shutil.which(compiler := COMPILERS[self.language][0]) is None:
            raise ValueError(f"language = {self.language!r}: there is no {compiler} here (apt install {compiler})")
        with closing(Sandbox(self.sandbox)) as probe:
            try:
                probe.check()
            except SandboxError as error:
                raise ValueError(f"sandbox = {self.sandbox!r}: {error}") from error

    def __call__(self, prompt: str, completion: str, answer: str, **fields: Any) -> Verdict:
        """Raises `ValueError` for tests that cannot be read or run."""
        problem = formats.problem(answer, fields)
        if problem.entry and self.language in COMPILERS:
            raise ValueError(f"tests of functions are for Python, not for {self.language}")
        program = completions.program(completion, self.language)
        if not program.strip():
            return Verdict(0.0, False, evidence={"failed": f"there is no {self.language} in the completion"})
        trial = Trial(self, problem, program, self._checker(fields.get("checker_code") or ""))
        try:
            return self._verdict(trial, len(problem.cases) or 1)
        finally:
            trial.close()

    def _verdict(self, trial: Trial, num_tests: int) -> Verdict:
        passed, evidence = 0, {}
        for number, outcome in enumerate(trial.outcomes(), 1):
            passed += outcome.passed
            if not outcome.passed and not evidence:
                evidence = {"failed": f"test {number} of {num_tests}", **outcome.evidence}
            if evidence and self.grade == "all":
                break
        solved = passed == num_tests
        score = passed / num_tests if self.grade == "fraction" else float(solved)
        return Verdict(score, solved, evidence=evidence, costs={"code_s": trial.taken_s()})

    def _checker(self, source: str) -> Checker | None:
        if source:
            return Judge(self, source)
        return load(self.checker) if self.checker else None


class Judge:
    """A checker that came with the data, in a sandbox of its own."""

    def __init__(self, rules: Rules, source: str):
        self._rules, self._source = rules, source

    def __call__(self, given: str, output: str, expected: str) -> bool:
        """False also where it raises or is too slow. Raises `ValueError` for source without a function `check`."""
        box = sandbox(self._rules.sandbox, "judge")
        limits = self._rules.limits(self._rules.total_s)
        with opened(sealed(self._source.encode())) as (program,):
            answers = call(box, program, "check", [[given, output, expected]], limits, [LONGEST_JUDGEMENT])
        if answers.end.code == RAISED:
            raise ValueError(f"checker_code: {answers.failure['errors']}")
        return bool(answers.given and answers.given[0].value)
