"""Times of several ways to do the same, one round of all after the other."""

import time
from collections.abc import Callable, Mapping

import torch

Arms = Mapping[str, Callable[[], object]]


def seconds(run: Callable[[], object], device: str) -> float:
    """Processor time on the CPU, so that other processes hit all alike; the device's time on CUDA."""
    if device == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def rounds_of(arms: Arms, rounds: int, device: str, repeat: int = 1) -> dict[str, list[float]]:
    """Seconds a call of every arm, of `repeat` calls together; the first round only warms up."""

    def repeated(run: Callable[[], object]) -> None:
        for _ in range(repeat):
            run()

    figures: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            taken = seconds(lambda run=run: repeated(run), device) / repeat
            if number > 0:
                figures[name].append(taken)
    return figures
