"""What became of groups: counted as it happens as from the ledger, and pass rates of prompts that come again."""

import json
from pathlib import Path

import fake_run
import msgspec
import numpy as np
import pytest

from engine.config import Config, ConfigError, parse
from engine.coordinator import Coordinator
from engine.ledger import Ledger
from engine.schema import Group, Lease, Prompt, Trained
from engine.tally import PassRate, Tally
from rewards.verdict import Verdict

SETTINGS = fake_run.config(max_staleness=1, groups_per_step=2)


class FewPrompts(fake_run.CountingPrompts):
    """Five of them, again and again."""

    def comes_again(self, domain: str) -> bool:
        return True

    def prompt(self, domain: str, index: int) -> Prompt:
        return Prompt(domain, index, np.array([index], np.int32), str(index % 5), "")


def coordinator(directory: Path) -> Coordinator:
    return Coordinator(SETTINGS, FewPrompts(), Ledger(directory / "ledger.db"), fake_run.raw_scores)


def scored(lease: Lease, *scores: float) -> Group:
    group = fake_run.result(lease, scores=lambda sample: scores[sample])
    return msgspec.structs.replace(group, verdicts=[Verdict.of(score) for score in scores])


def figures(tally: Tally) -> tuple[dict[str, int], ...]:
    counts = tally.rollouts, tally.trained, tally.ended, tally.in_flight
    return tuple({name: number for name, number in count.items() if number} for count in counts)


def test_the_tally_follows_from_the_ledger(tmp_path: Path) -> None:
    ours = coordinator(tmp_path)
    ours.begin(0.0)
    ours.join("g", 0.0)
    ours.published(0, 0.0)
    ours.applied("g", 0, 0, 0.0)
    ours.request("g", 8, 0.0)
    leases = ours.grants(0.0)["g"]
    assert len(leases) == 4
    ours.arrived(scored(leases[0], 1.0, 0.0), 1.0)
    ours.arrived(scored(leases[1], 1.0, 1.0), 1.0)  # filtered
    ours.arrived(scored(leases[2], 0.0, 1.0), 1.0)
    taken = ours.take(2, 0, 2.0)
    assert taken is not None
    ours.trained(Trained(1, [group.group_id for group in taken.groups], "trained"), 3.0)
    expected = {"a": 6}, {"a": 2}, {"a": 3}, {"a": 1}
    assert figures(ours.tally) == expected
    assert [ours.tally.share("a", str(prompt)) for prompt in range(5)] == [0.5, 1.0, 0.5, None, None]
    again = coordinator(tmp_path)
    again.begin(4.0, ours.snapshot(1))
    assert figures(again.tally) == expected
    assert [again.tally.share("a", str(prompt)) for prompt in range(5)] == [0.5, 1.0, 0.5, None, None]


def test_the_newest_draw_of_a_prompt_counts_whenever_it_arrives() -> None:
    tally = Tally()
    for index, solved in ((7, 3), (2, 1), (12, 0)):
        tally.judged(PassRate("a", "p", index, solved, 4))
    tally.judged(PassRate("a", "p", 99, 0, 0))  # nothing was judged
    assert [rate.solved for rate in tally._rates.values()] == [0]


def test_pass_rates_of_an_earlier_run_are_older_than_any_of_this_one(tmp_path: Path) -> None:
    before, path = Tally(), tmp_path / "pass_rates.jsonl"
    before.judged(PassRate("a", "p", 7, 3, 4))
    before.write(path)
    tally = Tally()
    tally.read(path)
    tally.judged(PassRate("a", "p", 0, 1, 4))
    assert [rate.share for rate in tally._rates.values()] == [0.25]
    path.write_text("{}")
    with pytest.raises(ConfigError, match="curriculum.rates: cannot read"):
        tally.read(path)


# ---- draws -------------------------------------------------------------------------------------------------------


def of_file(directory: Path, curriculum: dict[str, object], **columns: list[int]) -> Config:
    """Eight prompts, of which no column is given or the columns `columns`."""
    path = directory / "rows.jsonl"
    rows = [{"prompt": str(n), "answer": "", **{name: values[n] for name, values in columns.items()}} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    table = msgspec.to_builtins(SETTINGS)
    table["model"] = {"init": {"model_type": "qwen3"}, "context": 16, "tokenizer": {"alphabet": "0123456789"}}
    table["domains"] = [{"name": "a", "source": "file", "path": str(path)}]
    return parse({**table, "curriculum": curriculum})


def prompts(config: Config):  # noqa: ANN201
    from engine import tokenizer
    from engine.prompts import Prompts

    return Prompts(config, tokenizer.load(config.model))


def test_prompts_outside_the_pass_rates_are_passed_over_from_the_next_epoch_on(tmp_path: Path) -> None:
    """A pass rate of 6 of 16 is kept, one of 7 of 16 is not."""
    cursor, tally = prompts(of_file(tmp_path, {"pass_rate": [0.0, 0.375]})), Tally()
    first = [cursor.prompt(*cursor.draw(tally)) for _ in range(8)]
    assert sorted(prompt.text for prompt in first) == list("01234567")
    for prompt in first:
        solved = {"3": 6, "5": 7}.get(prompt.text, 16 if prompt.text < "2" else 0)
        tally.judged(PassRate("a", digest_of(prompt), prompt.index, solved, 16))
    second = [cursor.prompt(*cursor.draw(tally)).text for _ in range(5)]
    assert sorted(second) == list("23467")


def digest_of(prompt: Prompt) -> str:
    from engine.tally import digest

    return digest(prompt.text)


def test_where_no_prompt_is_left_the_draw_says_so(tmp_path: Path) -> None:
    cursor, tally = prompts(of_file(tmp_path, {"pass_rate": [0.5, 1.0]})), Tally()
    for _ in range(8):
        prompt = cursor.prompt(*cursor.draw(tally))
        tally.judged(PassRate("a", digest_of(prompt), prompt.index, 0, 4))
    with pytest.raises(ConfigError, match=r"curriculum.pass_rate = \[0.5, 1.0\]: no prompt of domain 'a' is left"):
        cursor.draw(tally)


def test_rows_are_chosen_by_their_columns(tmp_path: Path) -> None:
    levels = {"level": [0, 1, 2, 3, 4, 5, 6, 7]}
    cursor = prompts(of_file(tmp_path, {"columns": {"level": [2, 4], "absent": [0, 0]}}, **levels))
    assert sorted(cursor.prompt(*cursor.draw(Tally())).text for _ in range(3)) == list("234")
    with pytest.raises(ConfigError, match="curriculum.columns = .* no row of domains.0.path"):
        prompts(of_file(tmp_path, {"columns": {"level": [8, 9]}}, **levels))
