"""Evaluations in the making: which of their groups wait for a lease, and what the finished ones add up to."""

from collections import deque
from collections.abc import Iterable

import numpy as np

from engine.schema import Evaluation, Group, Kind, Prompt, Sampling, Score
from engine.task import Task


class Surveys:
    """The evaluations and probes under way, and the results of finished ones until they are asked for."""

    def __init__(self) -> None:
        self.num_tasks = 0  # ever; numbers them, so that every evaluation draws other random numbers
        self.completed: list[Evaluation] = []  # of those that nobody waits for
        self._under_way: dict[int, Survey] = {}  # by the number of its first task
        self._pending: deque[Task] = deque()
        self._evaluations: dict[str, Evaluation] = {}
        self._probes: dict[str, list[Group]] = {}

    @property
    def waited_for(self) -> bool:
        """Whether the learner stands still until one is done."""
        return any(survey.wait for survey in self._under_way.values())

    def under_way(self) -> list[str]:
        """The evaluations that nobody waits for, which a resume begins again."""
        return [survey.name for survey in self._under_way.values() if survey.kind == "eval" and not survey.wait]

    def begin(
        self, name: str, kind: Kind, wait: bool, prompts: list[Prompt], sampled: tuple[Sampling, int], now: float
    ) -> None:
        """Each of `prompts` is to be sampled as `sampled` says, so often."""
        number = self.num_tasks
        self._under_way[number] = Survey(name, kind, wait, len(prompts), now)
        for prompt in prompts:
            self._pending.append(Task(kind, self.num_tasks, prompt, *sampled, survey=number))
            self.num_tasks += 1
        self._conclude(number, now)

    def next_task(self) -> Task | None:
        return self._pending.popleft() if self._pending else None

    def give_back(self, task: Task) -> None:
        self._pending.appendleft(task)

    def add(self, task: Task, group: Group, now: float) -> None:
        self._under_way[task.survey].add(group)
        self._conclude(task.survey, now)

    def give_up(self, task: Task, now: float) -> None:
        self._under_way[task.survey].give_up(task.prompt, task.num_samples)
        self._conclude(task.survey, now)

    def evaluation(self, name: str) -> Evaluation | None:
        """The finished evaluation begun with `wait`, once."""
        return self._evaluations.pop(name, None)

    def probe(self, name: str) -> list[Group] | None:
        """The groups of a finished probe, once."""
        return self._probes.pop(name, None)

    def _conclude(self, number: int, now: float) -> None:
        survey = self._under_way[number]
        if not survey.done:
            return
        del self._under_way[number]
        if survey.kind == "probe":
            self._probes[survey.name] = survey.groups
        elif survey.wait:
            self._evaluations[survey.name] = survey.result(now)
        else:
            self.completed.append(survey.result(now))


class Survey:
    """One evaluation or probe: every prompt sampled and judged once."""

    def __init__(self, name: str, kind: Kind, wait: bool, num_groups: int, now: float):
        self.name = name
        self.kind = kind
        self.wait = wait
        self.groups: list[Group] = []
        self.num_lost: dict[str, int] = {}  # completions of groups given up, by domain
        self._num_open = num_groups
        self._started_s = now

    @property
    def done(self) -> bool:
        return self._num_open == 0

    def add(self, group: Group) -> None:
        self._num_open -= 1
        self.groups.append(group)

    def give_up(self, prompt: Prompt, num_samples: int) -> None:
        self._num_open -= 1
        self.num_lost[prompt.domain] = self.num_lost.get(prompt.domain, 0) + num_samples

    def result(self, now: float) -> Evaluation:
        versions = [group.versions for group in self.groups if len(group.versions)]
        domains = sorted({group.domain for group in self.groups} | self.num_lost.keys())
        scores = {
            domain: score([group for group in self.groups if group.domain == domain], self.num_lost.get(domain, 0))
            for domain in domains
        }
        if domains:
            scores["all"] = score(self.groups, sum(self.num_lost.values()))
        return Evaluation(
            name=self.name,
            first_version=min((int(each.min()) for each in versions), default=-1),
            last_version=max((int(each.max()) for each in versions), default=-1),
            wall_s=now - self._started_s,
            scores=scores,
        )


def score(groups: Iterable[Group], num_lost: int = 0) -> Score:
    """avg@k: the mean over prompts of the share of their judged completions that are solved.

    The standard error is clustered by prompt, sd(share) / sqrt(prompts): completions of one prompt are not
    independent. Completions without a judgement (`num_lost` more of them were never sampled) are counted and left
    out; so are prompts with no judged completion. NaN where nothing can be said.
    """
    shares, rewards, lengths, num_invalid = [], [], [], num_lost
    for group in groups:
        judged = [verdict for verdict in group.verdicts if not verdict.error]
        num_invalid += group.num_samples - len(judged)
        lengths += group.lengths
        if judged:
            shares.append(sum(verdict.solved for verdict in judged) / len(judged))
            rewards.append(sum(verdict.score for verdict in judged) / len(judged))
    num_prompts = len(shares)
    return Score(
        accuracy=float(np.mean(shares)) if shares else float("nan"),
        stderr=float(np.std(shares, ddof=1) / np.sqrt(num_prompts)) if num_prompts > 1 else float("nan"),
        reward=float(np.mean(rewards)) if rewards else float("nan"),
        num_prompts=num_prompts,
        num_completions=len(lengths),
        num_invalid=num_invalid,
        mean_length=float(np.mean(lengths)) if lengths else float("nan"),
    )
