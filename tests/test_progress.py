"""What the user sees of a running job: lines where the output is a file, a table on a terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from engine.progress import LINE_EVERY_S, Progress, duration

ROW = {
    "step": 3,
    "reward": 0.4142,
    "accuracy": 0.375,
    "length": 311.6,
    "truncated": 0.044,
    "drift": 0.0061,
    "grad_norm": 0.3125,
    "staleness": 1.818,
    "staleness_max": 2,
    "staleness_in_flight": 1.244,
    "staleness_in_queue": 0.574,
    "generated_tokens_per_s": 2335.4,
    "trained_tokens_per_s": 825.06,
    "generator_idle": 0.012,
    "learner_idle": 0.364,
    "bottleneck": "generation is the bottleneck: add generators or slots",
}


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def in_file(num_steps: int = 10, live: bool = True) -> tuple[Progress, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    return Progress("run", num_steps, live=live, console=Console(file=out, width=40), clock=clock), clock, out


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {**ROW, "step": step, **changes}


def test_a_step_is_one_line_in_a_file_however_narrow() -> None:
    progress, clock, out = in_file()
    progress.begin(1)
    clock.now_s += 30.0
    progress.step(row(3))
    assert out.getvalue() == (
        "step 3/10  reward 0.414  accuracy 37.5%  length 312 (4% cut off)  "
        "policy drift 0.0061, grad norm 0.31  staleness 1.82 (in flight 1.24, in queue 0.57, max 2)  "
        "tokens/s 2,335 generated, 825 trained  idle 1% generators, 36% learner  left 1 min 45 s\n"
    )  # 15 s a step since the first, seven to come


def test_lines_come_every_few_seconds_and_at_the_end() -> None:
    progress, clock, out = in_file(num_steps=9)
    progress.begin(0)
    for number in range(1, 10):
        clock.now_s += LINE_EVERY_S / 4
        progress.step(row(number))
    shown = [line.split()[1] for line in out.getvalue().splitlines()]
    assert shown == ["1/9", "5/9", "9/9"]


def test_phases_and_evaluations_are_lines_that_stay() -> None:
    progress, _, out = in_file()
    progress.phase("parity of generator and learner")
    progress.accuracy("evaluation 'before' at version 0: sum 27.1% ± 2.0%")
    progress.say("[model] is no markup")
    progress.close()
    progress.close()
    assert out.getvalue().splitlines() == [
        "leeway: parity of generator and learner",
        "evaluation 'before' at version 0: sum 27.1% ± 2.0%",
        "[model] is no markup",
    ]


def shown(progress: Progress) -> list[list[str]]:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(progress.table())
    return [line.split() for line in console.export_text().splitlines()]


def test_table_shows_every_figure() -> None:
    progress, clock, _ = in_file()
    progress.begin(0)
    clock.now_s += 6.0
    progress.step(row(3))
    progress.accuracy("sum 30% ± 2%")
    lines = shown(progress)
    assert lines[0] == ["run:", "training"]
    assert lines[1][0] == "step" and lines[1][-1] == "3/10"
    assert lines[2:] == [
        ["reward", "0.414"],
        ["accuracy", "37.5%"],
        "length 312 (4% cut off)".split(),
        "policy drift 0.0061, grad norm 0.31".split(),
        "staleness 1.82 (in flight 1.24, in queue 0.57, max 2)".split(),
        "tokens/s 2,335 generated, 825 trained".split(),
        "idle 1% generators, 36% learner".split(),
        "left 14 s".split(),
        "bottleneck generation is the bottleneck: add generators or slots".split(),
        "held out sum 30% ± 2%".split(),
    ]


def test_what_goes_wrong_in_a_step_is_a_line_of_its_own() -> None:
    progress, _, _ = in_file()
    progress.step(row(3, num_invalid=12, num_stale_tokens=0, skipped_updates=1))
    told = "trouble 12 completions beyond judgement, 1 updates skipped, not finite"
    assert told.split() in shown(progress)
    progress.step(row(4, num_invalid=0))
    assert not any(line[0] == "trouble" for line in shown(progress))


def test_table_before_the_first_step_of_a_resume_shows_where_it_starts() -> None:
    progress, _, _ = in_file()
    progress.begin(4)
    assert [line[-1] for line in shown(progress)] == ["training", "4/10"]


@pytest.mark.parametrize("live", [True, False])
def test_terminal_has_the_live_table_where_wanted(live: bool) -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=100, legacy_windows=False)
    progress = Progress("run", 10, live=live, console=console, clock=clock)
    progress.begin(0)
    clock.now_s += 1.0
    progress.step(row(3))
    progress.close()
    assert ("bottleneck" in out.getvalue()) == live
    assert "2,335 generated" in out.getvalue()


def test_a_terminal_that_cannot_draw_has_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=400, _environ={"TERM": "dumb"})
    progress = Progress("run", 10, live=True, console=console)
    progress.phase("evaluation 'before'")
    progress.begin(0)
    progress.step(row(3))
    assert [line.partition("  ")[0] for line in out.getvalue().splitlines()] == [
        "leeway: evaluation 'before'",
        "step 3/10",
    ]


@pytest.mark.parametrize(
    "seconds, text", [(0.0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (125.0, "2 min 5 s"), (7260.0, "2 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
