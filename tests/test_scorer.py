import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from extent import THOROUGH

from engine import config as configs
from engine.config import ConfigError
from engine.schema import Prompt
from engine.scorer import Scorer, check_rewards
from rewards.pool import Limits
from rewards.verdict import Verdict

DEADLINE_S = 0.5
JUDGE_S = 2.0


def behave(prompt, completion, answer, **fields):
    """A reward that does what the completion says."""
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "hang":
        while True:
            pass
    if completion == "sleep":
        time.sleep(0.6 * DEADLINE_S)
    if completion == "exit":
        os._exit(3)
    if completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "malformed":
        return Verdict(1.0, True, evidence={"number": 3})  # type: ignore[dict-item]
    if completion == "hoard":
        return float(len(bytearray(5 << 30)))
    if completion == "print":
        print("chatter", flush=True)
    if completion in ("spawn", "desert"):
        child = subprocess.Popen(["sleep", "60"])
        Path(fields["note"]).write_text(str(child.pid))
        child.wait() if completion == "spawn" else os._exit(3)
    return float("nan") if completion == "nan" else completion == answer


def make(reward=f"{__name__}:behave", workers=1, **options):
    return configs.parse({
        "run": {"name": "t", "steps": 1, "groups_per_step": 1, "group_size": 2},
        "model": {"init": {"model_type": "qwen3"}, "context": 100},
        "domains": [{"name": "d", "source": "file", "path": "x", "reward": reward, "reward_options": options}],
        "generator": {"max_new_tokens": 4, "reward_workers": workers},
        "learner": {"tokens_per_micro_batch": 1000, "lr": 1e-3},
        "deadlines": {"reward_s": DEADLINE_S, "judge_s": JUDGE_S},
    })


@pytest.fixture
def scorer():
    scorer = Scorer(make())
    yield scorer
    scorer.close()


def prompt(answer="yes", **fields):
    return Prompt("d", 0, np.zeros(1, np.int32), "?", answer, fields)


def collect(scorer, num_groups, within_s=20.0):
    found, ends = {}, time.monotonic() + within_s
    while len(found) < num_groups and time.monotonic() < ends:
        found.update(scorer.poll(0.05))
    assert len(found) == num_groups and time.monotonic() < ends
    return found


def judge(scorer, *completions, **fields):
    scorer.submit("key", prompt(**fields), list(completions))
    return collect(scorer, 1)["key"]


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def gone(pid):
    ends = time.monotonic() + 5
    while time.monotonic() < ends:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        select.select([], [], [], 0.02)
    return False


def test_groups_come_back_whole_and_in_order_from_many_workers():
    scorer = Scorer(make(workers=2))
    for key in range(20):
        scorer.submit(key, prompt(str(key % 3)), ["0", "1", "2"])
    found = collect(scorer, 20)
    scorer.close()
    assert all([verdict.solved for verdict in found[key]] == [key % 3 == n for n in range(3)] for key in range(20))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("raise", "KeyError: 'no such thing'"),
        ("nan", "the score is nan"),
        ("malformed", "ValidationError: Expected `str`, got `int` - at `$.evidence[...]`"),
        ("hoard", "MemoryError: "),
        ("hang", "no word within 0.5 s (signal 9)"),
        ("exit", "its process died (exit code 3)"),
        ("kill", "its process died (signal 9)"),
    ],
)
def test_only_the_guilty_completion_is_lost(scorer, bad, reason):
    verdicts = judge(scorer, "yes", bad, "no", "yes")
    assert [verdict.error for verdict in verdicts] == ["", reason, "", ""]
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 1.0]
    assert scorer.pool.num_restarts == (bad in ("hang", "exit", "kill"))


def test_a_group_of_which_all_die_ends_too(scorer):
    assert all("exit code 3" in verdict.error for verdict in judge(scorer, "exit", "exit", "exit"))


def test_the_deadline_is_of_a_completion_not_of_a_group(scorer):
    assert [verdict.error for verdict in judge(scorer, "sleep", "sleep", "sleep")] == ["", "", ""]


def test_a_late_poll_does_not_blame_the_innocent(scorer):
    judge(scorer, "yes")
    scorer.submit("key", prompt(), ["yes", "no"])
    select.select([], [], [], 1.5 * DEADLINE_S)
    [(_, verdicts)] = scorer.poll()
    assert [verdict.error for verdict in verdicts] == ["", ""]


def test_what_a_reward_prints_disturbs_nothing(scorer):
    assert not judge(scorer, "print", "yes")[0].error


def test_poll_does_not_wait_and_fileno_tells_when_to_come_back(scorer):
    judge(scorer, "yes")
    assert scorer.poll() == []
    scorer.submit("key", prompt(), ["yes"])
    assert select.select([scorer.fileno()], [], [], 10)[0]
    assert collect(scorer, 1)["key"][0].solved


@pytest.mark.parametrize("how", ["spawn", "desert"])
def test_what_a_reward_started_dies_with_it(scorer, tmp_path, how):
    judge(scorer, how, note=str(tmp_path / "pid"))
    assert gone((tmp_path / "pid").read_text())


def test_close_ends_the_workers_in_the_middle_of_a_reward():
    scorer = Scorer(make())
    judge(scorer, "yes")
    scorer.submit("key", prompt(), ["hang"])
    pids = scorer.pool.pids
    scorer.close()
    assert all(gone(pid) for pid in pids)


def test_workers_and_what_they_started_die_with_their_owner(tmp_path):
    """The owner is killed while a reward waits for its child: nobody is left to read the end of the socket."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import {__name__} as here
        scorer = here.Scorer(here.make())
        here.judge(scorer, "yes")
        scorer.submit("key", here.prompt(note={str(tmp_path / "pid")!r}), ["spawn"])
        print(*scorer.pool.pids, flush=True)
        sys.stdin.read()
    """
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout and owner.stdin
    pids = owner.stdout.readline().split()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        select.select([], [], [], 0.02)
    pids.append((tmp_path / "pid").read_text())
    assert len(pids) == 3 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    owner.stdin.close()
    try:
        assert all(gone(pid) for pid in pids)
    finally:
        for pid in pids:
            kill(int(pid))


def test_the_loss_of_the_process_that_starts_workers_costs_no_completion():
    scorer = Scorer(make(workers=2))
    judge(scorer, "yes")
    for key in range(3):
        scorer.submit(key, prompt(), ["sleep", "yes"])
    kill(scorer.pool.pids[0])
    found = collect(scorer, 3)
    scorer.close()
    assert all([verdict.error for verdict in verdicts] == ["", ""] for verdicts in found.values())
    assert all(found[key][1].solved for key in range(3)) and scorer.pool.num_restarts == 1


@pytest.mark.parametrize("place", ["unsorted", "queued", "judged"])
def test_a_cancelled_group_gives_its_worker_to_the_next(place):
    scorer = Scorer(make())
    if place != "unsorted":  # which workers judge it is known
        judge(scorer, "yes")
    if place == "queued":
        scorer.submit("before", prompt(), ["sleep"])
    scorer.submit("cancelled", prompt(), ["sleep"] * 1000)
    scorer.cancel("cancelled")
    scorer.cancel("unknown")
    scorer.submit("next", prompt(), ["yes"])
    found = collect(scorer, 1 + (place == "queued"))
    assert found.pop("next")[0].solved and found.keys() <= {"before"}
    assert scorer.pool.num_restarts == (place == "judged") and scorer.poll(DEADLINE_S) == []
    scorer.close()


# ---- rewards that wait -----------------------------------------------------------------------------------------

UNDER_WAY = []


async def attend(prompt, completion, answer, **fields):
    """A reward that waits as the completion says; its score is how many wait with it."""
    if completion == "spin":
        while True:
            pass
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "exit":
        await asyncio.sleep(0.1)
        os._exit(3)
    UNDER_WAY.append(completion)
    await asyncio.sleep(60 if completion == "hang" else 0.1)
    most = len(UNDER_WAY)
    await asyncio.sleep(0.1)
    UNDER_WAY.remove(completion)
    return float(most)


@pytest.fixture
def waiting():
    scorer = Scorer(make(f"{__name__}:attend"))
    yield scorer
    scorer.close()


def test_rewards_that_wait_wait_together(waiting):
    for key in range(5):
        waiting.submit(key, prompt(), ["a", "b", "c", "d"])
    found = collect(waiting, 5)
    assert max(verdict.score for verdicts in found.values() for verdict in verdicts) == 20


def test_a_reward_that_waits_too_long_or_raises_costs_itself(waiting):
    waiting.submit("first", prompt(), ["hang", "a", "raise"])
    waiting.submit("second", prompt(), ["b"])
    found = collect(waiting, 2)
    assert [verdict.error for verdict in found["first"]] == [
        f"no verdict within {JUDGE_S:g} s",
        "",
        "KeyError: 'no such thing'",
    ]
    assert found["second"][0].error == "" and waiting.pool.num_restarts == 0


@pytest.mark.parametrize(("bad", "reason"), [("spin", "no word within 0.5 s (signal 9)"), ("exit", "(exit code 3)")])
def test_one_that_sticks_or_dies_among_many_is_found(waiting, bad, reason):
    waiting.submit("first", prompt(), ["a", bad, "b"])
    for key in range(3):
        waiting.submit(key, prompt(), ["c", "d"])
    found = collect(waiting, 4)
    assert [verdict.error[-len(reason) :] for verdict in found.pop("first")] == ["", reason, ""]
    assert not any(verdict.error for verdicts in found.values() for verdict in verdicts)
    assert waiting.pool.num_restarts == 2  # among all, and alone


def test_a_cancelled_group_that_waits_harms_no_other(waiting):
    judge(waiting, "a")
    waiting.submit("cancelled", prompt(), ["hang", "a"])
    waiting.submit("other", prompt(), ["b"])
    waiting.cancel("cancelled")
    assert collect(waiting, 1)["other"][0].error == "" and waiting.pool.num_restarts == 0
    assert waiting.poll(JUDGE_S + DEADLINE_S) == []


def test_both_kinds_side_by_side():
    config = make(f"{__name__}:attend")
    other = msgspec.structs.replace(config.domains[0], name="computes", reward=f"{__name__}:behave")
    scorer = Scorer(msgspec.structs.replace(config, domains=[*config.domains, other]))
    scorer.submit("waits", prompt(), ["a"])
    scorer.submit("computes", msgspec.structs.replace(prompt(), domain="computes"), ["yes", "hang", "no"])
    found = collect(scorer, 2)
    scorer.close()
    assert [verdict.score for verdict in found["computes"]] == [1.0, 0.0, 0.0]
    assert found["waits"][0].score == 1.0 and scorer.pool.num_restarts == 1


# ---- a day in small --------------------------------------------------------------------------------------------


def resident_mb(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def day(num_groups, group_size=8):
    """Scores groups of which one completion in twenty raises, hangs or dies; every verdict by key, and the growth of
    this process and the nursery in MB."""
    bad = ["raise", "exit", "kill", "hang", "nan"]
    others = children()  # that other tests have left running
    scorer = Scorer(make(workers=2))
    scorer.pool._limits = Limits(reward_s=0.3)
    found, sizes = {}, []
    for key in range(num_groups):
        numbers = range(key * group_size, (key + 1) * group_size)
        texts = [bad[number // 20 % len(bad)] if number % 20 == 7 else ["yes", "no"][number % 2] for number in numbers]
        scorer.submit(key, prompt(), texts)
        while key - len(found) > 10:
            found.update(scorer.poll(0.05))
        if key in (num_groups // 2, num_groups - 1):
            sizes.append([resident_mb(pid) for pid in (os.getpid(), scorer.pool.pids[0])])
    while len(found) < num_groups:
        found.update(scorer.poll(0.05))
    pids = scorer.pool.pids
    scorer.close()
    assert all(gone(pid) for pid in pids)
    assert children() <= others
    return found, [last - first for first, last in zip(sizes[0], sizes[-1], strict=True)]


def children():
    return {pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [2500 if THOROUGH else 600])
def test_a_day_of_bad_completions_is_all_accounted_for(num_groups):
    found, growth = day(num_groups)
    verdicts = [(n, v) for key in range(num_groups) for n, v in enumerate(found[key], key * 8)]
    assert [n for n, verdict in verdicts if verdict.error] == list(range(7, num_groups * 8, 20))
    assert all(verdict.solved == (n % 2 == 0) for n, verdict in verdicts if not verdict.error)
    assert max(growth) < 8, growth


def test_a_package_of_the_users_named_rewards_is_not_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    scorer = Scorer(make("exact"))
    assert judge(scorer, "yes")[0].solved
    scorer.close()


def test_workers_that_cannot_start_are_an_error(capfd):
    scorer = Scorer(make("nowhere.at_all:reward"))
    with pytest.raises(RuntimeError, match="could not start; the last ended: exit code 1"):
        collect(scorer, 1)
    scorer.close()
    assert "cannot import 'nowhere.at_all:reward'" in capfd.readouterr().err


def test_rewards_are_checked_before_anything_starts():
    check_rewards(make("exact"))
    with pytest.raises(ConfigError, match=r"domains.0.reward = 'exakt': unknown reward"):
        check_rewards(make("exakt"))
    with pytest.raises(ConfigError, match="^domains.0.reward_options.strip = True: no such option"):
        check_rewards(make("exact", strip=True))
