"""A program on trial: its tests run in a sandbox, and what comes out is compared here, where the answers are."""

import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from threading import get_ident
from typing import Any

import msgspec

from rewards.code import comparison
from rewards.code.formats import Case, Problem
from rewards.options import Count, Positive, Unsigned
from rewards.sandbox import values
from rewards.sandbox.files import content, opened, sealed, sink
from rewards.sandbox.limits import COMPILER, MIB, Limits
from rewards.sandbox.sandbox import End, Job, Sandbox
from rewards.verdict import brief

COMPILERS = {"cpp": ["g++", "-std=gnu++17", "-O2", "-w", "-x", "c++", "-", "-o", "main"]}
PATIENCE_S = 0.5  # beyond the processor's time, for a machine that is busy
LONGEST_EVIDENCE = 300
LONGEST_ERRORS = 1 << 20
RAISED, BROKEN = 1, 5  # exit codes: of a program that raised, of a check that is none

Checker = Callable[[str, str, str], Any]  # (input, output, expected) -> whether it is right


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How programs run and what counts as right."""

    language: str = "python"
    compare: str = "lines"
    tolerance: Unsigned = 0.0
    time_s: Positive = 4.0
    total_s: Positive = 8.0
    memory_mib: Count = 1024
    sandbox: str = "bubblewrap"

    def limits(self, left_s: float) -> Limits:
        memory_bytes = self.memory_mib * MIB
        wall_s = max(0.0, min(1.5 * self.time_s + PATIENCE_S, left_s))
        return Limits(cpu_s=self.time_s, wall_s=wall_s, memory_bytes=memory_bytes, stack_bytes=memory_bytes // 4)


class Outcome(msgspec.Struct, frozen=True):
    """Of one test; `evidence` says why it failed."""

    passed: bool
    evidence: dict[str, str] = {}


NO_TIME = Outcome(False, {"why": "no time left"})


class Answer(msgspec.Struct, frozen=True):
    """To one call: its value, or why there is none."""

    value: Any = None
    failure: dict[str, str] = {}


class Answers(msgspec.Struct, frozen=True):
    """To the first of some calls, and how their process ended; `failure` says why there are no more."""

    given: list[Answer]
    end: End
    failure: dict[str, str]


@cache
def _sandbox(walls: str, role: str, process: int, thread: int) -> Sandbox:
    return Sandbox(walls)


def sandbox(walls: str, role: str) -> Sandbox:
    """This thread's sandbox for `role`: programs under test and those that judge them never share one."""
    return _sandbox(walls, role, os.getpid(), get_ident())


def close_sandboxes() -> None:
    """Those of all threads, none of which may be using one."""
    _sandbox.cache_clear()


class Trial:
    """One program and its `total_s` seconds, which begin now."""

    def __init__(self, rules: Rules, problem: Problem, program: str, checker: Checker | None = None):
        self._rules, self._problem, self._checker = rules, problem, checker
        self._begin = time.monotonic()
        self._box = sandbox(rules.sandbox, "program")
        self._program = sealed(f"{problem.prelude}\n{program}".encode(errors="replace"))

    def close(self) -> None:
        os.close(self._program)

    def outcomes(self) -> Iterator[Outcome]:
        """One test's after the other's. A program that does not compile has a single one."""
        problem = self._problem
        if self._rules.language in COMPILERS and (failure := self._compile()):
            yield Outcome(False, failure)
        elif problem.check:
            yield self._check()
        else:
            yield from self._call_all(problem.cases) if problem.entry else map(self._converse, problem.cases)

    def taken_s(self) -> float:
        return time.monotonic() - self._begin

    def _left_s(self) -> float:
        return self._rules.total_s - self.taken_s()

    def _limits(self) -> Limits:
        return self._rules.limits(self._left_s())

    def _compile(self) -> dict[str, str]:
        """Puts the compiled program in the source's place, or says why there is none."""
        limits = msgspec.structs.replace(COMPILER, wall_s=max(0.0, min(COMPILER.wall_s, self._left_s())))
        job = Job(kind="compiler", strict=False, arguments=COMPILERS[self._rules.language], made="main", limits=limits)
        with opened(sink(), made := sink()) as (said, _):
            end = self._box.run(job, [self._program, said, said, made])
            if failure := explain(end, said, "error"):
                return {**failure, "why": f"does not compile: {failure['why']}"}
            os.close(self._program)
            # What is open for writing cannot be executed.
            self._program = os.open(f"/proc/self/fd/{made}", os.O_RDONLY | os.O_CLOEXEC)
        return {}

    def _converse(self, case: Case) -> Outcome:
        """Standard input in, standard output out."""
        if self._left_s() <= 0:
            return NO_TIME
        kind = "binary" if self._rules.language in COMPILERS else "script"
        job = Job(kind=kind, limits=self._limits())
        with opened(sealed(case.given.encode()), sink(), sink()) as (given, output, errors):
            end = self._box.run(job, [given, output, errors, self._program])
            if failure := explain(end, errors):
                return Outcome(False, failure)
            written = content(output, job.limits.file_bytes)
        text = written.decode(errors="replace")
        return Outcome(True) if self._is_right(case, text) else wrong(text, case.expected)

    def _is_right(self, case: Case, text: str) -> bool:
        rules = self._rules
        if len(text) > comparison.longest(len(case.expected)):
            return False
        if self._checker is not None:
            return bool(self._checker(case.given, text, case.expected))
        return comparison.TEXTS[rules.compare](text, case.expected, rules.tolerance)

    def _call_all(self, cases: list[Case]) -> Iterator[Outcome]:
        """Arguments in, values out, both as data. One process takes as many calls as one test's time allows; where it
        ends early, the next one begins with the call that it owes, which thus gets all of that time."""
        while cases:
            if self._left_s() <= 0:
                yield from [NO_TIME] * len(cases)
                return
            arguments = [case.given for case in cases]
            longest = [comparison.longest(len(values.encode(case.expected))) for case in cases]
            answers = call(self._box, self._program, self._problem.entry, arguments, self._limits(), longest)
            given = answers.given or [Answer(failure=answers.failure)]
            yield from map(self._judge, cases, given)
            cases = cases[len(given) :]

    def _judge(self, case: Case, answer: Answer) -> Outcome:
        if answer.failure:
            return Outcome(False, answer.failure)
        allowed = [case.expected, *case.alternatives]
        right = any(comparison.values(answer.value, each, self._rules.tolerance) for each in allowed)
        return Outcome(True) if right else wrong(repr(answer.value), repr(case.expected))

    def _check(self) -> Outcome:
        """The check runs in a sandbox of its own and calls the function in the other one; only arguments and values,
        as data, go between them."""
        problem, limits = self._problem, self._limits()
        judge = sandbox(self._rules.sandbox, "judge")
        program = Job(kind="calls", entry=problem.entry, changed=True, limits=limits)
        check = Job(kind="check", entry=problem.entry, limits=limits)
        texts = [sealed(text.encode()) for text in ("", problem.prelude, problem.check)]
        with opened(*texts, sink(), sink(), sink()) as (nothing, prelude, test, output, errors, complaints):
            (calls_out, calls_in), (results_out, results_in) = os.pipe(), os.pipe()
            with opened(calls_out, calls_in, results_out, results_in):
                self._box.begin(program, [nothing, output, errors, self._program, calls_out, results_in])
                judge.begin(check, [prelude, output, complaints, test, calls_in, results_out])
            end = judge.finish(limits.wall_s)
            ours = self._box.finish(PATIENCE_S)
            if end.code == BROKEN:
                raise ValueError(f"the test cannot be run: {complaint(complaints)}")
            if end.code == 0:
                return Outcome(True)
            cause = explain(ours, errors) if end.stopped or ours.code else {}  # else it was only slow to end
            return Outcome(False, cause or explain(end, complaints))


def call(
    box: Sandbox, program: int, entry: str, arguments: list[list[Any]], limits: Limits, longest: list[int]
) -> Answers:
    """Calls `entry` of a program in one process, with each of `arguments`. Of an answer with more than its `longest`
    bytes nothing is read."""
    job = Job(kind="calls", entry=entry, limits=limits)
    lines = "".join(values.encode((each, {})) + "\n" for each in arguments)
    with opened(sealed(b""), sink(), sink(), sealed(lines.encode()), sink()) as files:
        nothing, output, errors, calls, results = files
        end = box.run(job, [nothing, output, errors, program, calls, results])
        whole = content(results, limits.file_bytes).split(b"\n")[:-1]
        given = [_answer(line, most) for line, most in zip(whole, longest, strict=False)]
        return Answers(given, end, explain(end, errors) or {"why": "no value"})


def _answer(line: bytes, longest: int) -> Answer:
    if len(line) > longest:
        return Answer(failure={"why": "wrong answer", "given": "far too long"})
    try:
        kind, *rest = values.decode(line)
    except (ValueError, TypeError) as error:
        return Answer(failure={"why": f"no value: {brief(str(error))}"})
    if kind == "return" and len(rest) == 1:
        return Answer(value=rest[0])
    return Answer(failure={"why": "raised", "errors": brief(": ".join(map(str, rest)), LONGEST_EVIDENCE)})


def explain(end: End, errors: int, mark: str = "") -> dict[str, str]:
    """Why a run has failed; nothing where it has not."""
    if end.code == 0:
        return {}
    if end.stopped == "time" or end.code == -24:
        return {"why": "too slow"}
    why = end.stopped or (f"signal {-end.code}" if end.code and end.code < 0 else f"exit code {end.code}")
    return {"why": why, "errors": complaint(errors, mark)}


def complaint(errors: int, mark: str = "") -> str:
    """The last line of what a run said on its standard error, or the first one with `mark`."""
    said = content(errors, LONGEST_ERRORS).decode(errors="replace").strip().split("\n")
    marked = [line for line in said if mark and mark in line]
    return brief((marked or said[-1:])[0], LONGEST_EVIDENCE)


def wrong(given: str, expected: str) -> Outcome:
    texts = {"given": brief(given.strip(), LONGEST_EVIDENCE), "expected": brief(expected.strip(), LONGEST_EVIDENCE)}
    return Outcome(False, {"why": "wrong answer", **texts})
