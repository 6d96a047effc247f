"""Groups on their way through the coordinator: granted, arrived, taken, trained."""

import math
from pathlib import Path

import fake_run
import msgspec
import pytest
from fake_run import applied, beat, begun, enter, give, step

from engine.coordinator import HOPELESS, Coordinator
from engine.schema import Failure, Lease, Took, Trained
from engine.task import followed


def test_grants_no_more_than_tickets_and_no_more_than_asked(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)  # 2 * 2 tickets, groups of 2
    assert [lease.group_id for lease in enter(coordinator, "g", 5)] == [0, 1, 2]  # while the request is above 0
    assert [lease.group_id for lease in enter(coordinator, "h", 99)] == [3]
    assert coordinator.tickets.num_free == 0


def test_nothing_is_leased_before_weights_are_applied(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    coordinator.join("g", 0.0)
    coordinator.request("g", 4, 0.0)
    assert coordinator.grants(0.0) == {}


def test_a_skipped_update_holds_its_tickets_as_long(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    step(coordinator, coordinator.take(2, 0, 1.0), end="failed")
    assert coordinator.tickets.num_free == 0
    coordinator.applied("g", applied(1), 2.0)
    assert coordinator.tickets.num_free == 2
    assert coordinator.state().ends["failed"] == 2


def test_of_a_take_in_several_updates_the_groups_of_a_skipped_one_failed(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    coordinator.take(2, 0, 1.0)
    coordinator.trained(Trained(1, [0, 1], "trained", "non-finite update", skipped=[1]))
    ends = coordinator.state().ends
    assert (ends["trained"], ends["failed"]) == (1, 1)
    assert coordinator._ledger.counts() == ends and coordinator._ledger.audit() == []
    query = "SELECT group_id, state, reason FROM groups WHERE taken_version = 0"
    rows = coordinator._ledger._db.execute(query).fetchall()
    assert rows == [(0, "trained", ""), (1, "failed", "non-finite update")]


def test_a_filtered_group_gives_its_ticket_to_the_next_prompt(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    first, *rest = enter(coordinator, "g", 8)
    assert give(coordinator, first, uniform=True) == [""]
    coordinator.request("g", 2, 1.0)
    assert [lease.group_id for lease in coordinator.grants(1.0)["g"]] == [4]
    give(coordinator, *rest)
    assert coordinator.take(2, 0, 1.0) is not None
    row = coordinator._ledger._db.execute("SELECT group_ids, filtered_ids FROM takes").fetchone()
    assert row == ("[1,2]", "[0]")


def test_no_more_is_drawn_than_the_last_steps_can_use(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, steps=2, max_staleness=4)  # 10 tickets
    leases = enter(coordinator, "g", 99)
    assert [lease.group_id for lease in leases] == [0, 1, 2, 3]
    give(coordinator, *leases)
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.applied("g", applied(1), 2.0)
    assert coordinator.grants(2.0) == {}
    step(coordinator, coordinator.take(2, 1, 2.0))
    coordinator.applied("g", applied(2), 2.0)
    assert coordinator.grants(2.0) == {}
    assert coordinator.state().ends["in_flight"] == 0


def test_where_groups_are_filtered_as_many_more_are_drawn_for_the_last_steps(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, steps=1, max_staleness=4)
    first, second = enter(coordinator, "g", 99)
    give(coordinator, first, uniform=True)
    assert len(coordinator.grants(1.0)["g"]) == 2  # one of two was lost: now 3 are in flight, of which 2 might do
    give(coordinator, second)
    assert coordinator.grants(1.0) == {}


def test_the_end_of_a_run_waits_for_no_group_and_loses_none(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, steps=1, max_staleness=4)
    first, second = enter(coordinator, "g", 99)
    give(coordinator, first, uniform=True)
    third, straggler = coordinator.grants(1.0)["g"]
    give(coordinator, second, third)
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.published(1, 2.0)
    assert coordinator.heartbeat("g", beat(straggler), 2.0) == [straggler.key]  # it is to let go of it
    coordinator.applied("g", applied(1), 2.0)
    assert coordinator.grants(2.0) == {}
    longer = begun(tmp_path, snapshot=coordinator.snapshot(1), steps=2, max_staleness=4)
    assert straggler.group_id in [lease.group_id for lease in enter(longer, "g", 99, now=3.0)]


def test_groups_that_fail_one_after_the_other_are_told_and_end_the_job(tmp_path: Path) -> None:
    coordinator, first = begun(tmp_path), "1 valid completions of 2: died"

    def judge(errors: int) -> None:
        coordinator.request("g", 2, 1.0)
        [lease] = coordinator.grants(1.0)["g"]
        coordinator.arrived(fake_run.result(lease, errors=errors), 1.0)

    coordinator.join("g", 0.0)
    coordinator.applied("g", applied(0), 0.0)
    for errors in (2, 0, 1):
        judge(errors)
        assert coordinator.stalled(1.0) == coordinator.hopeless == ""  # one of a step's two at most
    for _ in range(HOPELESS - 1):
        assert coordinator.hopeless == ""
        judge(2)
        assert coordinator.stalled(1.0) == f"group after group fails; the first of them: {first}"
    assert coordinator.hopeless == f"{HOPELESS} groups in a row failed; the first: {first}"
    judge(0)
    assert coordinator.hopeless == ""


def test_what_the_metrics_need_of_a_take(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    leases = enter(coordinator, "g", 8)
    give(coordinator, *leases[:3], now=1.0)
    step(coordinator, coordinator.take(2, 0, 1.5))
    give(coordinator, leases[3], now=4.0)
    taken = coordinator.take(2, 1, 6.0)
    assert taken is not None
    assert (taken.arrival_versions, taken.queue_s) == ([0, 1], [5.0, 2.0])
    assert taken.state.ends == {
        "trained": 2, "filtered": 0, "failed": 0, "expired": 0, "in_flight": 2, "drawn": 4
    }  # fmt: skip


def test_a_result_counts_once(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    lease, *_ = enter(coordinator, "g", 8)
    assert give(coordinator, lease, lease) == ["", "no longer leased"]
    assert coordinator.state().buffered_groups == 1


def test_results_of_another_incarnation_are_fenced(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    lease, *_ = enter(coordinator, "g", 8)
    stale = fake_run.result(lease, incarnation=7)
    assert coordinator.arrived(stale, 1.0).reason == "incarnation 7 is over"
    assert give(coordinator, lease) == [""]


@pytest.mark.parametrize(
    ("versions", "reason"),
    [([0, 1], "tokens of versions 0 to 1, leased at 0 with 0 published"), ([-1], "tokens of versions -1 to -1")],
)
def test_tokens_of_impossible_versions_are_refused(tmp_path: Path, versions: list[int], reason: str) -> None:
    coordinator = begun(tmp_path)
    lease, *_ = enter(coordinator, "g", 8)
    assert coordinator.arrived(fake_run.result(lease, versions=versions), 1.0).reason.startswith(reason)
    assert coordinator.state().ends["in_flight"] == 4


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_log_probability_that_is_no_number_is_refused(tmp_path: Path, bad: float) -> None:
    coordinator = begun(tmp_path)
    lease, *_ = enter(coordinator, "g", 8)
    group = fake_run.result(lease)
    logprobs = group.logprobs.copy()
    logprobs[-1] = bad
    reason = coordinator.arrived(msgspec.structs.replace(group, logprobs=logprobs), 1.0).reason
    assert reason == "a log-probability is infinite or not a number"


def test_staleness_zero_hands_out_a_whole_step_at_once(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, max_staleness=0, groups_per_step=3)
    leases = enter(coordinator, "g", 99)
    assert [lease.group_id for lease in leases] == [0, 1, 2]
    give(coordinator, *reversed(leases))
    taken = coordinator.take(3, 0, 1.0)
    assert taken is not None and [group.group_id for group in taken.groups] == [0, 1, 2]
    assert coordinator.grants(1.0) == {}
    step(coordinator, taken)
    assert coordinator.grants(2.0) == {}
    coordinator.applied("g", applied(1), 2.0)
    assert [(lease.group_id, lease.version) for lease in coordinator.grants(2.0)["g"]] == [(3, 1), (4, 1), (5, 1)]


def test_staleness_zero_replaces_filtered_groups_in_rounds(tmp_path: Path) -> None:
    """Which groups are sampled together must not depend on when a result comes in."""
    coordinator = begun(tmp_path, max_staleness=0, groups_per_step=3)
    leases = enter(coordinator, "g", 99)
    give(coordinator, leases[0], leases[2], uniform=True)
    assert coordinator.grants(1.0) == {}
    give(coordinator, leases[1])
    assert [lease.group_id for lease in coordinator.grants(1.0)["g"]] == [3, 4]


def test_staleness_zero_goes_on_with_a_round_that_no_request_covered(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, max_staleness=0, groups_per_step=3)
    assert len(enter(coordinator, "g", 2)) == 1
    coordinator.request("g", 99, 1.0)
    assert [lease.group_id for lease in coordinator.grants(1.0)["g"]] == [1, 2]


def test_decisions_are_noted_in_order(tmp_path: Path) -> None:
    notes = []
    coordinator = fake_run.coordinator(fake_run.config(max_staleness=0), tmp_path, note=notes.append)
    coordinator.begin(0.0)
    coordinator.published(0, 0.0)
    give(coordinator, *enter(coordinator, "g", 4))
    coordinator.take(2, 0, 1.0)
    assert [type(note).__name__ for note in notes] == ["Granted", "Granted", "Ack", "Ack", "Took"]
    assert notes[-1] == Took(0, [0, 1])


# ---- schedules ---------------------------------------------------------------------------------------------------


def scheduled(tmp_path: Path) -> Coordinator:
    """Groups of 3 up to 4 tokens long from step 1 on; of 2 up to 8 tokens before."""
    entry = {"step": 1, "generator": {"temperature": 0.5, "max_new_tokens": 4}, "run": {"group_size": 3}}
    settings = msgspec.structs.replace(fake_run.config(), schedule=[entry])
    coordinator = fake_run.coordinator(settings, tmp_path)
    coordinator.begin(0.0)
    coordinator.published(0, 0.0)
    return coordinator


def sampled(*leases: Lease) -> set[tuple[int, int, float, int]]:
    return {
        (lease.version, lease.num_samples, lease.sampling.temperature, lease.sampling.max_new_tokens)
        for lease in leases
    }


def test_leases_follow_the_schedule_by_their_own_version(tmp_path: Path) -> None:
    """That is what they are judged by: neither the learner's, which may be ahead, nor that of an earlier lease."""
    coordinator = scheduled(tmp_path)
    leases = enter(coordinator, "g", 99)
    assert sampled(*leases) == {(0, 2, 1.0, 8)}
    assert give(coordinator, leases[0], leases[1]) == ["", ""]
    step(coordinator, coordinator.take(2, 0, 2.0))
    coordinator.failure("g", Failure("train", 2, 1, "out of memory"), 2.0)
    early = coordinator.grants(2.0)["g"]  # version 1 is trained and published, but not applied
    assert [lease.group_id for lease in early] == [2] and sampled(*early) == {(0, 2, 1.0, 8)}
    coordinator.applied("g", applied(1), 2.0)
    coordinator.failure("g", Failure("train", 3, 1, "out of memory"), 2.0)
    late = coordinator.grants(2.0)["g"]
    assert [lease.group_id for lease in late] == [3, 4, 5] and sampled(*late) == {(1, 3, 0.5, 4)}
    assert give(coordinator, *early, *late) == [""] * 4


def test_a_group_drawn_ahead_of_the_weights_is_sampled_as_it_is_judged(tmp_path: Path) -> None:
    coordinator = scheduled(tmp_path)
    leases = enter(coordinator, "g", 99)
    give(coordinator, *leases[:2])
    step(coordinator, coordinator.take(2, 0, 2.0))
    give(coordinator, leases[2], uniform=True)  # filtered: its ticket serves a new draw
    (drawn,) = coordinator.grants(2.0)["g"]
    assert drawn.group_id == 4 and sampled(drawn) == {(0, 2, 1.0, 8)}


def test_evaluations_follow_the_schedule(tmp_path: Path) -> None:
    """Else a curriculum of longer answers would be measured cut off at the first limit."""
    coordinator = scheduled(tmp_path)
    coordinator.evaluate("before", "eval", True, 0.0)
    leases = enter(coordinator, "g", 99)
    assert {lease.sampling.max_new_tokens for lease in leases} == {8}
    give(coordinator, *leases)
    give(coordinator, *coordinator.grants(1.0)["g"])
    step(coordinator, coordinator.take(2, 0, 2.0))
    coordinator.applied("g", applied(1), 2.0)
    coordinator.evaluate("after", "eval", True, 2.0)
    assert {lease.sampling.max_new_tokens for lease in coordinator.grants(2.0)["g"]} == {4}


def test_the_temperature_follows_the_entropy_also_over_a_resume(tmp_path: Path) -> None:
    plain = fake_run.config()
    generator = msgspec.structs.replace(plain.generator, target_entropy=0.3)
    settings = msgspec.structs.replace(plain, generator=generator)
    coordinator = fake_run.coordinator(settings, tmp_path)
    coordinator.begin(0.0)
    coordinator.published(0, 0.0)
    leases = enter(coordinator, "g", 99)
    assert {lease.sampling.temperature for lease in leases} == {1.0}
    give(coordinator, *leases)
    taken = coordinator.take(2, 0, 2.0)
    assert taken is not None
    group_ids = [group.group_id for group in taken.groups]
    coordinator.trained(Trained(1, group_ids, "trained", entropy=0.8))  # too high: cooler
    coordinator.published(1, 2.0)
    coordinator.applied("g", applied(1), 2.0)
    (cooler,) = {lease.sampling.temperature for lease in coordinator.grants(2.0)["g"]}
    assert cooler == pytest.approx(math.exp(-0.2 * 0.5))
    again = fake_run.coordinator(settings, tmp_path)
    again.begin(3.0, coordinator.snapshot(1))
    again.published(1, 3.0)
    assert {lease.sampling.temperature for lease in enter(again, "h", 99, 3.0)} == {cooler}


def test_the_temperature_keeps_within_bounds() -> None:
    generator = msgspec.structs.replace(fake_run.config().generator, target_entropy=0.3, temperature=0.8)
    assert followed(generator, None, None) is None
    assert followed(generator, 0.7, math.nan) == 0.7  # of an update that was skipped
    assert followed(generator, 1.59, 0.0) == 1.6
    assert followed(generator, 0.41, 9.0) == 0.4
