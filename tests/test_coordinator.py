import math
from pathlib import Path

import fake_run
import msgspec
import pytest

from engine.config import ConfigError
from engine.coordinator import Coordinator
from engine.roster import Roster
from engine.schema import Failure, Granted, Heartbeat, Lapsed, Lease, Taken, Took, Trained
from engine.task import followed


def begun(tmp_path: Path, *, snapshot: bytes | None = None, **settings: float) -> Coordinator:
    """A job whose weights are published, without generators yet."""
    coordinator = fake_run.coordinator(fake_run.config(**settings), tmp_path)  # type: ignore[arg-type]
    coordinator.begin(0.0, snapshot)
    coordinator.published(coordinator.version, 0.0)
    return coordinator


def enter(coordinator: Coordinator, name: str, num_samples: int, now: float = 0.0) -> list[Lease]:
    """A generator joins, applies the newest weights and asks; what it is granted."""
    coordinator.join(name, now)
    coordinator.applied(name, coordinator.incarnation, coordinator.roster.published, now)
    coordinator.request(name, num_samples, now)
    return coordinator.grants(now).get(name, [])


def give(coordinator: Coordinator, *leases: Lease, now: float = 1.0, uniform: bool = False) -> list[str]:
    """The leases' results arrive; the reasons of the acknowledgements."""
    scores = (lambda sample: 1.0) if uniform else float
    results = [fake_run.result(lease, coordinator.incarnation, scores=scores) for lease in leases]
    return [coordinator.arrived(result, now).reason for result in results]


def beat(*held: Lease) -> Heartbeat:
    return Heartbeat([lease.key for lease in held], 0, 0.0, 0.0)


def step(coordinator: Coordinator, taken: Taken | None, end: str = "trained") -> None:
    assert taken is not None
    version = coordinator.version + 1
    group_ids = [group.group_id for group in taken.groups]
    coordinator.trained(Trained(version, group_ids, end), 2.0)  # type: ignore[arg-type]
    coordinator.published(version, 2.0)


def test_grants_no_more_than_tickets_and_no_more_than_asked(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)  # 2 * 2 tickets, groups of 2
    assert [lease.group_id for lease in enter(coordinator, "g", 5)] == [0, 1, 2]  # while the request is above 0
    assert [lease.group_id for lease in enter(coordinator, "h", 99)] == [3]
    assert coordinator.state(0.0).free_tickets == 0


def test_nothing_is_leased_before_weights_are_applied(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    coordinator.join("g", 0.0)
    coordinator.request("g", 4, 0.0)
    assert coordinator.grants(0.0) == {}


def test_two_generators_share_what_comes_free(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    for name in ("g", "h"):
        coordinator.join(name, 0.0)
        coordinator.applied(name, 0, 0, 0.0)
        coordinator.request(name, 8, 0.0)
    granted = coordinator.grants(0.0)
    assert [lease.group_id for lease in granted["g"]] == [0, 2]
    assert [lease.group_id for lease in granted["h"]] == [1, 3]


def test_who_asks_for_most_comes_first_and_members_are_looked_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = begun(tmp_path)
    for name, num_samples in (("g", 3), ("h", 8)):
        coordinator.join(name, 0.0)
        coordinator.applied(name, 0, 0, 0.0)
        coordinator.request(name, num_samples, 0.0)
    looks = []
    monkeypatch.setattr(Roster, "newest_applied", property(lambda roster: looks.append(roster) or 0))
    granted = {name: [lease.group_id for lease in leases] for name, leases in coordinator.grants(0.0).items()}
    assert granted == {"h": [0, 1, 2], "g": [3]}
    assert [coordinator.roster.members[name].num_wanted for name in "gh"] == [1, 2]
    assert len(looks) == 1


def test_leases_go_only_to_the_newest_applied_version(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    leases = enter(coordinator, "g", 4)
    enter(coordinator, "h", 0)
    give(coordinator, *leases)
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.applied("g", 0, 1, 2.0)
    coordinator.request("h", 8, 2.0)
    assert coordinator.grants(2.0) == {}
    coordinator.request("g", 2, 2.0)
    assert [lease.version for lease in coordinator.grants(2.0)["g"]] == [1]


def test_tickets_return_when_the_last_routed_generator_applied(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    leases = enter(coordinator, "g", 8)
    enter(coordinator, "h", 0)
    give(coordinator, *leases)
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.applied("g", 0, 1, 2.0)
    assert coordinator.tickets.num_free == 0
    coordinator.applied("h", 0, 1, 2.0)
    assert coordinator.tickets.num_free == 2


def test_a_skipped_update_holds_its_tickets_as_long(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    step(coordinator, coordinator.take(2, 0, 1.0), end="failed")
    assert coordinator.tickets.num_free == 0
    coordinator.applied("g", 0, 1, 2.0)
    assert coordinator.tickets.num_free == 2
    assert coordinator.state(2.0).ends["failed"] == 2


def test_of_a_take_in_several_updates_the_groups_of_a_skipped_one_failed(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    coordinator.take(2, 0, 1.0)
    coordinator.trained(Trained(1, [0, 1], "trained", "non-finite update", skipped=[1]), 2.0)
    ends = coordinator.state(2.0).ends
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
    coordinator.applied("g", 0, 1, 2.0)
    assert coordinator.grants(2.0) == {}
    step(coordinator, coordinator.take(2, 1, 2.0))
    coordinator.applied("g", 0, 2, 2.0)
    assert coordinator.grants(2.0) == {}
    assert coordinator.state(2.0).ends["in_flight"] == 0


def test_where_groups_are_filtered_as_many_more_are_drawn_for_the_last_steps(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, steps=1, max_staleness=4)
    first, second = enter(coordinator, "g", 99)
    give(coordinator, first, uniform=True)
    assert len(coordinator.grants(1.0)["g"]) == 2  # one of two was lost: now 3 are in flight, of which 2 might do
    give(coordinator, second)
    assert coordinator.grants(1.0) == {}


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
    assert coordinator.state(1.0).buffered_groups == 1


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
    assert coordinator.state(1.0).ends["in_flight"] == 4


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_log_probability_that_is_no_number_is_refused(tmp_path: Path, bad: float) -> None:
    coordinator = begun(tmp_path)
    lease, *_ = enter(coordinator, "g", 8)
    group = fake_run.result(lease)
    logprobs = group.logprobs.copy()
    logprobs[-1] = bad
    reason = coordinator.arrived(msgspec.structs.replace(group, logprobs=logprobs), 1.0).reason
    assert reason == "a log-probability is infinite or not a number"


def test_a_version_applied_is_told_once_however_often_it_is_said(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    enter(coordinator, "g", 8)
    coordinator.applied("g", coordinator.incarnation, 0, 1.0)
    (num_told,) = coordinator._ledger._db.execute("SELECT count(*) FROM events WHERE event = 'applied'").fetchone()
    assert num_told == 1


def test_a_stall_is_explained(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, publish_s=10.0)
    roster = coordinator.roster
    assert [roster.stalled(now) for now in (0.0, 9.0)] == ["", ""]
    assert roster.stalled(10.0).startswith("no generator is a member")
    coordinator.join("slow", 10.0)
    assert roster.stalled(11.0) == "no generator has applied version 0: slow loads its model; see their logs"
    coordinator.applied("slow", 0, 0, 12.0)
    assert [roster.stalled(now) for now in (12.0, 500.0)] == ["", ""]
    coordinator.leave("slow", "left", 501.0)
    assert [bool(roster.stalled(now)) for now in (505.0, 511.0)] == [False, True]


def test_a_generator_that_still_loads_its_model_may_be_silent_until_start_s(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, lease_s=20.0, start_s=100.0)
    coordinator.join("slow", 0.0)
    assert coordinator.next_deadline() == 100.0
    assert coordinator.tick(99.0) == [] and coordinator.has("slow")
    assert coordinator.tick(100.0) == ["slow: silent for 100 s; its groups go to others"]


def test_a_dead_generators_groups_go_to_another_with_a_new_lease_version(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, lease_s=20.0)
    leases = enter(coordinator, "g", 4)  # groups 0, 1
    enter(coordinator, "h", 4)  # groups 2, 3
    coordinator.request("h", 0, 15.0)
    assert coordinator.next_deadline() == 20.0
    assert coordinator.tick(19.0) == []
    assert coordinator.tick(20.0) == ["g: silent for 20 s; its groups go to others"]
    assert not coordinator.has("g")
    coordinator.version, coordinator.roster.published = 1, 1
    coordinator.applied("h", 0, 1, 21.0)
    coordinator.request("h", 4, 21.0)
    again = coordinator.grants(21.0)["h"]
    assert [(lease.group_id, lease.attempt, lease.version) for lease in again] == [(0, 2, 1), (1, 2, 1)]
    assert give(coordinator, leases[0]) == ["attempt 2 took its place"]
    assert give(coordinator, again[0]) == [""]


def test_a_generator_that_starts_anew_has_lost_what_it_held(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    enter(coordinator, "g", 4)
    again = enter(coordinator, "g", 4)
    assert [(lease.group_id, lease.attempt) for lease in again] == [(0, 2), (1, 2)]


def test_three_bad_ends_of_its_leases_fail_a_group(tmp_path: Path) -> None:
    notes = []
    settings = fake_run.config()
    coordinator = fake_run.coordinator(settings, tmp_path, note=notes.append)
    coordinator.begin(0.0)
    coordinator.published(0, 0.0)
    (lease,) = enter(coordinator, "g", 2)
    for attempt in (1, 2, 3):
        assert coordinator.failure("g", Failure("train", 0, attempt, "out of memory"), 1.0).reason == ""
        coordinator.request("g", 2, 1.0)
        (lease,) = coordinator.grants(1.0)["g"]
    assert (lease.group_id, lease.attempt) == (1, 1)
    assert coordinator.state(1.0).ends["failed"] == 1
    assert [type(note) for note in notes] == [Granted, Lapsed] * 3 + [Granted]


def test_leaving_is_nobodys_fault(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    for attempt in range(1, 6):
        (lease,) = enter(coordinator, "g", 2)
        assert (lease.group_id, lease.attempt) == (0, attempt)
        coordinator.leave("g", "left", 0.0)


def test_a_lease_lost_on_its_way_is_found_by_the_second_heartbeat(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, heartbeat_s=0.5)
    enter(coordinator, "g", 4, now=5.0)
    held = Heartbeat([("train", 1, 1)], 0, 0.0, 0.0)
    coordinator.heartbeat("g", held, 6.0)  # may have crossed the lease
    assert coordinator.state(6.0).leased_groups == 2
    coordinator.heartbeat("g", held, 8.0)
    assert coordinator.state(8.0).leased_groups == 1
    coordinator.request("g", 2, 8.0)
    assert [(lease.group_id, lease.attempt) for lease in coordinator.grants(8.0)["g"]] == [(0, 2)]


def test_heartbeats_that_crossed_a_lease_do_not_lose_it(tmp_path: Path) -> None:
    """One comes after every applied version, close behind another; and one at the end of a turn begun before."""
    coordinator = begun(tmp_path, heartbeat_s=2.0)
    enter(coordinator, "g", 4, now=10.0)
    for now in (10.001, 10.002, 13.0):
        coordinator.heartbeat("g", Heartbeat([], 0, 0.0, 0.0), now)
        assert coordinator.state(now).leased_groups == 2
    coordinator.heartbeat("g", Heartbeat([], 0, 0.0, 0.0), 15.0)
    assert coordinator.state(15.0).leased_groups == 0


def test_a_lease_held_too_long_is_taken_back(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, lease_s=100.0, group_s=50.0)
    enter(coordinator, "g", 2, now=10.0)
    assert coordinator.next_deadline() == 60.0
    coordinator.tick(60.0)
    assert coordinator.state(60.0).leased_groups == 0


def test_a_holder_is_told_what_lapsed_until_it_lets_go(tmp_path: Path) -> None:
    """By attempt, since it may be granted the same group anew."""
    coordinator = begun(tmp_path, lease_s=1000.0, group_s=50.0)
    old, lapsed = enter(coordinator, "g", 4)  # groups 0, 1
    assert coordinator.heartbeat("g", beat(old, lapsed), 10.0) == []
    give(coordinator, old)
    coordinator.tick(50.0)
    enter(coordinator, "h", 2, now=50.0)
    for _ in range(2):  # it did not hear of it, nor of the acknowledgement
        assert coordinator.heartbeat("g", beat(old, lapsed), 51.0) == [old.key, lapsed.key]
    coordinator.leave("h", "left", 52.0)
    coordinator.request("g", 2, 52.0)
    (again,) = coordinator.grants(52.0)["g"]
    assert again.group_id == lapsed.group_id
    assert coordinator.heartbeat("g", beat(lapsed, again), 53.0) == [lapsed.key]
    assert give(coordinator, again) == [""]


def test_an_older_attempt_held_does_not_hide_that_the_newer_was_lost(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, lease_s=1000.0, group_s=50.0, heartbeat_s=1.0)
    (lapsed,) = enter(coordinator, "g", 2)
    coordinator.tick(50.0)
    coordinator.request("g", 2, 50.0)
    assert [lease.attempt for lease in coordinator.grants(50.0)["g"]] == [2]
    for now in (60.0, 62.0):
        coordinator.heartbeat("g", beat(lapsed), now)
    assert coordinator.state(62.0).leased_groups == 0


def test_a_generator_that_does_not_apply_leaves_routing_until_it_does(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, lease_s=100.0, publish_s=30.0)
    leases = enter(coordinator, "g", 8)
    enter(coordinator, "h", 0)
    give(coordinator, *leases)
    step(coordinator, coordinator.take(2, 0, 1.0))  # published at 2
    coordinator.applied("g", 0, 1, 3.0)
    assert coordinator.tickets.num_free == 0
    assert coordinator.tick(32.0) == ["h: did not apply version 1 in 30 s; it gets no groups until it does"]
    assert coordinator.tickets.num_free == 2
    coordinator.applied("h", 0, 1, 33.0)
    coordinator.request("h", 2, 33.0)
    assert len(coordinator.grants(33.0)["h"]) == 1


def test_a_generator_that_applies_before_the_publish_is_heard_owes_nothing(tmp_path: Path) -> None:
    """The weights lie ready before the learner says so, and a generator that joins just then finds them."""
    coordinator = begun(tmp_path, lease_s=100.0, publish_s=30.0)
    give(coordinator, *enter(coordinator, "g", 8))
    taken = coordinator.take(2, 0, 1.0)
    assert taken is not None
    coordinator.trained(Trained(1, [group.group_id for group in taken.groups], "trained"), 2.0)
    coordinator.applied("g", 0, 1, 2.0)
    coordinator.published(1, 2.0)
    assert coordinator.tick(33.0) == []
    coordinator.request("g", 4, 33.0)
    assert len(coordinator.grants(33.0)["g"]) == 2


def test_weights_older_than_what_is_settled_do_not_route(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.applied("g", 0, 1, 2.0)
    coordinator.leave("g", "left", 2.0)
    coordinator.join("h", 2.0)
    coordinator.applied("h", 0, 0, 2.0)
    coordinator.request("h", 8, 2.0)
    assert coordinator.grants(2.0) == {}
    coordinator.applied("h", 0, 1, 2.0)
    assert [lease.version for lease in coordinator.grants(2.0)["h"]] == [1, 1]


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
    coordinator.applied("g", 0, 1, 2.0)
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


def test_an_evaluation_that_is_waited_for_stands_alone_and_is_pinned(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.evaluate("after", "eval", True, 2.0)
    coordinator.request("g", 99, 2.0)
    assert coordinator.grants(2.0) == {}  # version 1 is published, but not applied
    coordinator.applied("g", 0, 1, 2.0)
    leases = coordinator.grants(2.0)["g"]
    assert [(lease.kind, lease.version) for lease in leases] == [("eval", 1)] * 3
    give(coordinator, *leases[:2])
    assert coordinator.grants(2.0) == {} and coordinator.evaluation("after") is None
    give(coordinator, leases[2])
    evaluation = coordinator.evaluation("after")
    assert evaluation is not None and (evaluation.first_version, evaluation.last_version) == (1, 1)
    assert [lease.kind for lease in coordinator.grants(2.0)["g"]] == ["train", "train"]


def test_an_evaluation_in_the_background_takes_turns_and_needs_no_tickets(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    coordinator.evaluate("step 1", "eval", False, 0.0)
    leases = enter(coordinator, "g", 99)
    assert [lease.kind for lease in leases] == ["eval", "train", "eval", "train", "eval", "train", "train"]
    give(coordinator, *leases)
    state = coordinator.state(1.0)
    assert [evaluation.name for evaluation in state.completed_evaluations] == ["step 1"]
    assert (state.buffered_groups, state.ends["drawn"]) == (4, 4)
    assert coordinator.state(1.0).completed_evaluations == []


def test_evaluations_do_not_make_the_learner_wait(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, max_staleness=0)
    give(coordinator, *enter(coordinator, "g", 4))
    coordinator.evaluate("step 0", "eval", False, 1.0)
    coordinator.request("g", 99, 1.0)
    assert len(coordinator.grants(1.0)["g"]) == 3
    assert coordinator.take(2, 0, 1.0) is not None


def test_a_probe_does_not_move_the_cursor(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    coordinator.evaluate("parity", "probe", True, 0.0)
    leases = enter(coordinator, "g", 99)
    assert [(lease.kind, lease.prompt.index) for lease in leases] == [("probe", index) for index in range(4)]
    give(coordinator, *leases)
    groups = coordinator.probe("parity")
    assert groups is not None and len(groups) == 4
    assert [lease.prompt.index for lease in coordinator.grants(1.0)["g"]] == [0, 1, 2, 3]


def test_a_resume_goes_on_from_the_snapshot(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    leases = enter(coordinator, "g", 8)
    give(coordinator, *leases[:3])
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.evaluate("step 1", "eval", False, 2.0)
    snapshot = coordinator.snapshot(step=1)  # 0, 1 trained; 2 buffered; 3 leased
    give(coordinator, leases[3])
    step(coordinator, coordinator.take(2, 1, 3.0))
    coordinator.applied("g", 0, 1, 3.0)
    coordinator.request("g", 99, 3.0)
    assert 4 in [lease.group_id for lease in coordinator.grants(3.0)["g"]]  # drawn, and will be undone
    coordinator._ledger.close()

    resumed = begun(tmp_path, snapshot=snapshot)
    assert (resumed.incarnation, resumed.version) == (1, 1)
    assert resumed.state(0.0).ends == {
        "trained": 2, "filtered": 0, "failed": 0, "expired": 0, "in_flight": 2, "drawn": 4
    }  # fmt: skip
    again = enter(resumed, "g", 99)
    training = [lease for lease in again if lease.kind == "train"]
    assert [lease.prompt.index for lease in training] == [3, 4, 5]
    assert [(lease.group_id, lease.attempt, lease.version) for lease in training] == [(3, 2, 1), (4, 1, 1), (5, 1, 1)]
    assert [lease.kind for lease in again].count("eval") == 3
    give(resumed, *again)
    taken = resumed.take(2, 1, 5.0)
    assert taken is not None and [group.group_id for group in taken.groups] == [2, 3]
    assert taken.queue_s[0] == 5.0  # since the resume: the old clock is gone
    assert resumed._ledger.audit() == []


def test_a_resume_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    coordinator._ledger.close()
    resumed = begun(tmp_path)
    assert resumed.incarnation == 1
    assert [(lease.group_id, lease.attempt) for lease in enter(resumed, "g", 4)] == [(0, 1), (1, 1)]


def test_a_snapshot_that_cannot_be_continued_is_refused(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    enter(coordinator, "g", 8)
    snapshot = coordinator.snapshot(step=0)
    coordinator._ledger.close()
    with pytest.raises(ConfigError, match="holds 4 groups in flight, but there are only 2 tickets"):
        begun(tmp_path, snapshot=snapshot, groups_per_step=1)
    with pytest.raises(ConfigError, match="cannot be read"):
        begun(tmp_path, snapshot=snapshot[:50])


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
    coordinator.applied("g", 0, 1, 2.0)
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
    coordinator.applied("g", 0, 1, 2.0)
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
    coordinator.trained(Trained(1, group_ids, "trained", entropy=0.8), 2.0)  # too high: cooler
    coordinator.published(1, 2.0)
    coordinator.applied("g", 0, 1, 2.0)
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
