"""What became of groups: counted as it happens as from the ledger, and pass rates of prompts that come again."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import fake_run
import msgspec
import numpy as np
import pytest

from engine.config import Config, ConfigError, parse
from engine.coordinator import Coordinator
from engine.ledger import Ledger
from engine.schema import Group, Lease, Prompt, Trained
from engine.tally import Exhausted, PassRate, Tally, digest
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
    ours.applied("g", fake_run.applied(0), 0.0)
    ours.request("g", 8, 0.0)
    leases = ours.grants(0.0)["g"]
    assert len(leases) == 4
    ours.arrived(scored(leases[0], 1.0, 0.0), 1.0)
    ours.arrived(scored(leases[1], 1.0, 1.0), 1.0)  # filtered
    ours.arrived(scored(leases[2], 0.0, 1.0), 1.0)
    taken = ours.take(2, 0, 2.0)
    assert taken is not None
    ours.trained(Trained(1, [group.group_id for group in taken.groups], "trained"))
    expected = {"a": 6}, {"a": 2}, {"a": 3}, {"a": 1}
    assert figures(ours.draws.tally) == expected
    assert [ours.draws.tally.share("a", str(prompt)) for prompt in range(5)] == [0.5, 1.0, 0.5, None, None]
    again = coordinator(tmp_path)
    again.begin(4.0, ours.snapshot(1))
    assert figures(again.draws.tally) == expected
    assert [again.draws.tally.share("a", str(prompt)) for prompt in range(5)] == [0.5, 1.0, 0.5, None, None]


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


def of_file(directory: Path, curriculum: dict[str, object], **columns: list[Any]) -> Config:
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
    return digest(prompt.text)


def test_where_no_prompt_is_left_the_draw_says_so(tmp_path: Path) -> None:
    cursor, tally = prompts(of_file(tmp_path, {"pass_rate": [0.5, 1.0]})), Tally()
    for _ in range(8):
        prompt = cursor.prompt(*cursor.draw(tally))
        tally.judged(PassRate("a", digest_of(prompt), prompt.index, 0, 4))
    before = cursor.state()
    with pytest.raises(Exhausted, match=r"curriculum.pass_rate = \[0.5, 1.0\]: no prompt of domain 'a' is left"):
        cursor.draw(tally)
    assert cursor.state() == before


def test_a_prompt_that_is_left_is_found_wherever_it_stands(tmp_path: Path) -> None:
    """Also one that the last epoch had early and the next has late."""
    tally = Tally()
    for text in "0123456":
        tally.judged(PassRate("a", digest(text), 0, 0, 4))
    for num_drawn in range(8):
        cursor = prompts(of_file(tmp_path, {"pass_rate": [0.5, 1.0]}))
        cursor.restore({"num_draws": 0, "num_drawn": {"a": num_drawn}})
        assert cursor.prompt(*cursor.draw(tally)).text == "7"


class Curriculum(FewPrompts):
    """Those that were solved are not drawn again."""

    def is_wanted(self, name: str, index: int, tally: Tally) -> bool:
        return tally.share(name, str(index % 5)) != 1.0

    def draw(self, tally: Tally, left_out: Container[str]) -> tuple[str, int]:
        for index in range(self.drawn, self.drawn + 5):
            if self.is_wanted("a", index, tally):
                self.drawn = index + 1
                return "a", index
        raise Exhausted("solved", "a")


def exhausted(directory: Path) -> Coordinator:
    """Four tickets; the pass rates say that prompt 2 alone is not solved."""
    ours = Coordinator(SETTINGS, Curriculum(), Ledger(directory / "ledger.db"), fake_run.raw_scores)
    ours.begin(0.0)
    for text in "0134":
        ours.draws.tally.judged(PassRate("a", digest(text), -1, 4, 4))
    ours.join("g", 0.0)
    ours.published(0, 0.0)
    ours.applied("g", fake_run.applied(0), 0.0)
    return ours


def test_the_learner_is_told_when_no_prompt_is_left(tmp_path: Path) -> None:
    ours = exhausted(tmp_path)
    ours.request("g", 2, 0.0)
    [lease] = ours.grants(0.0)["g"]
    assert ours.take(2, 0, 0.0) is None
    ours.arrived(scored(lease, 1.0, 1.0), 1.0)  # solved, filtered
    ours.request("g", 2, 1.0)
    assert ours.grants(1.0) == {}
    taken = ours.take(2, 0, 1.0)
    assert taken is not None
    assert taken.exhausted == "solved: no prompt of domain 'a' is left"
    assert (taken.groups, taken.state.ends["in_flight"]) == ([], 0)
    again = Coordinator(SETTINGS, Curriculum(), Ledger(tmp_path / "ledger.db"), fake_run.raw_scores)
    again.begin(2.0, ours.snapshot(0))  # the others were never drawn
    again.join("g", 2.0)
    again.published(0, 2.0)
    again.applied("g", fake_run.applied(0, again.incarnation), 2.0)
    again.request("g", 8, 2.0)
    assert [lease.prompt.index % 5 for lease in again.grants(2.0)["g"]] == [3, 4, 0, 1]


def test_prompts_are_not_exhausted_while_a_result_may_bring_one_back(tmp_path: Path) -> None:
    ours = exhausted(tmp_path)
    ours.request("g", 4, 0.0)
    first, second = ours.grants(0.0)["g"]  # of the same prompt
    ours.arrived(scored(first, 1.0, 1.0), 1.0)
    ours.request("g", 2, 1.0)
    assert ours.grants(1.0) == {}
    assert ours.take(2, 0, 1.0) is None
    ours.arrived(scored(second, 0.0, 1.0), 2.0)
    assert ours.take(2, 0, 2.0) is None
    [third] = ours.grants(2.0)["g"]
    ours.arrived(scored(third, 0.0, 1.0), 3.0)
    taken = ours.take(2, 0, 3.0)
    assert taken is not None
    assert (len(taken.groups), taken.exhausted) == (2, "")


def of_two_files(directory: Path, mixture: str) -> Config:
    """A prompt in each of two domains; what was solved is not drawn again."""
    table = msgspec.to_builtins(of_file(directory, {"pass_rate": [0.0, 0.5], "mixture": {"name": mixture}}))
    table["domains"] = []
    for name, text in (("a", "0"), ("b", "1")):
        path = directory / f"{name}.jsonl"
        path.write_text(json.dumps({"prompt": text, "answer": ""}))
        table["domains"].append({"name": name, "source": "file", "path": str(path)})
    return parse(table)


@pytest.mark.parametrize("mixture", ["static", "adaptive", "deficit"])
def test_a_domain_that_is_left_out_gives_its_share_to_the_others(tmp_path: Path, mixture: str) -> None:
    cursor, tally = prompts(of_two_files(tmp_path, mixture)), Tally()
    tally.arrived("b", 1000)  # so that it is a's turn
    tally.trained["b"] = tally.ended["b"] = 1000
    assert "a" in {cursor.draw(tally)[0] for _ in range(9)}
    assert {cursor.draw(tally, {"a"})[0] for _ in range(9)} == {"b"}


def test_where_one_domain_has_no_prompt_left_the_others_go_on(tmp_path: Path) -> None:
    config = of_two_files(tmp_path, "deficit")
    ours = Coordinator(config, prompts(config), Ledger(tmp_path / "ledger.db"), fake_run.raw_scores)
    ours.begin(0.0)
    ours.published(0, 0.0)
    ours.join("g", 0.0)
    ours.applied("g", fake_run.applied(0), 0.0)

    def granted() -> list[Lease]:
        ours.request("g", 99, 1.0)
        return ours.grants(1.0).get("g", [])

    first, second, third, fourth = granted()
    assert [lease.prompt.domain for lease in (first, second, third, fourth)] == ["a", "b", "a", "b"]
    ours.arrived(scored(first, 1.0, 1.0), 1.0)
    (fifth,) = granted()
    assert fifth.prompt.domain == "b" and ours.state().exhausted == ["a"]
    ours.arrived(scored(third, 0.0, 0.0), 1.0)  # a later draw of the same prompt: it is wanted again
    assert ours.state().exhausted == []
    (sixth,) = granted()
    assert sixth.prompt.domain == "a"
    for lease in (second, fourth, fifth, sixth):
        assert ours.take(2, 0, 1.0) is None
        ours.arrived(scored(lease, 1.0, 1.0), 1.0)
    assert granted() == []
    taken = ours.take(2, 0, 1.0)
    assert taken is not None and sorted(taken.state.exhausted) == ["a", "b"]
    assert all(f"no prompt of domain {name!r} is left" in taken.exhausted for name in "ab")


def test_rows_are_chosen_by_their_columns(tmp_path: Path) -> None:
    levels = {"level": [0, 1, 2, 3, 4, 5, 6, 7]}
    cursor = prompts(of_file(tmp_path, {"columns": {"level": [2, 4], "absent": [0, 0]}}, **levels))
    assert sorted(cursor.prompt(*cursor.draw(Tally())).text for _ in range(3)) == list("234")
    with pytest.raises(ConfigError, match="curriculum.columns = .* no row of domains.0.path"):
        prompts(of_file(tmp_path, {"columns": {"level": [8, 9]}}, **levels))


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), ("hard", "'hard'"), ([3], r"\[3\]")])
def test_a_column_of_the_curriculum_holds_numbers(tmp_path: Path, value: object, shown: str) -> None:
    levels = {"level": [0, 1.5, value, 3, 4, 5, 6, 7]}
    line = rf"^curriculum.columns.level: row 3 of domain 'a' has {shown}, which is no number$"
    with pytest.raises(ConfigError, match=line):
        prompts(of_file(tmp_path, {"columns": {"level": [2, 4]}}, **levels))
