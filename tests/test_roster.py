"""Generators as the coordinator sees them: what they apply, when they fall silent, and what they held then."""

from pathlib import Path

import pytest
from fake_run import applied, begun, enter, give, step

from engine.coordinator import Coordinator
from engine.roster import Roster
from engine.schema import Trained


def test_two_generators_share_what_comes_free(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    for name in ("g", "h"):
        coordinator.join(name, 0.0)
        coordinator.applied(name, applied(0), 0.0)
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
        coordinator.applied(name, applied(0), 0.0)
        coordinator.request(name, num_samples, 0.0)
    looks = []
    monkeypatch.setattr(Roster, "newest_applied", property(lambda roster: looks.append(roster) or 0))
    granted = {name: [lease.group_id for lease in leases] for name, leases in coordinator.grants(0.0).items()}
    assert granted == {"h": [0, 1, 2], "g": [3]}
    assert [coordinator.roster.members[name].num_wanted for name in "gh"] == [1, 2]
    assert len(looks) == 1


def one_behind(tmp_path: Path, num_samples: int) -> Coordinator:
    """Version 1 is published; of two generators, g, which asked for `num_samples`, has applied it and h has not."""
    coordinator = begun(tmp_path)
    leases = enter(coordinator, "g", num_samples)
    enter(coordinator, "h", 0)
    give(coordinator, *leases)
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.applied("g", applied(1), 2.0)
    return coordinator


def test_leases_go_only_to_the_newest_applied_version(tmp_path: Path) -> None:
    coordinator = one_behind(tmp_path, 4)
    coordinator.request("h", 8, 2.0)
    assert coordinator.grants(2.0) == {}
    coordinator.request("g", 2, 2.0)
    assert [lease.version for lease in coordinator.grants(2.0)["g"]] == [1]


def test_tickets_return_when_the_last_routed_generator_applied(tmp_path: Path) -> None:
    coordinator = one_behind(tmp_path, 8)
    assert coordinator.tickets.num_free == 0
    coordinator.applied("h", applied(1), 2.0)
    assert coordinator.tickets.num_free == 2


def test_a_version_applied_is_told_once_however_often_it_is_said(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    enter(coordinator, "g", 8)
    coordinator.applied("g", applied(0, coordinator.incarnation), 1.0)
    (num_told,) = coordinator._ledger._db.execute("SELECT count(*) FROM events WHERE event = 'applied'").fetchone()
    assert num_told == 1


def test_a_stall_is_explained(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, publish_s=10.0)
    roster = coordinator.roster
    assert [roster.stalled(now) for now in (0.0, 9.0)] == ["", ""]
    assert roster.stalled(10.0).startswith("no generator is a member")
    coordinator.join("slow", 10.0)
    assert roster.stalled(11.0) == "no generator has applied version 0: slow loads its model; see their logs"
    coordinator.applied("slow", applied(0), 12.0)
    assert [roster.stalled(now) for now in (12.0, 500.0)] == ["", ""]
    coordinator.leave("slow", "left", 501.0)
    assert [bool(roster.stalled(now)) for now in (505.0, 511.0)] == [False, True]


def test_a_generator_that_still_loads_its_model_may_be_silent_until_start_s(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, lease_s=20.0, start_s=100.0)
    coordinator.join("slow", 0.0)
    assert coordinator.next_deadline() == 100.0
    assert coordinator.tick(99.0) == [] and coordinator.has("slow")
    assert coordinator.tick(100.0) == ["slow: silent for 100 s; its groups go to others"]


def test_a_generator_that_does_not_apply_leaves_routing_until_it_does(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, lease_s=100.0, publish_s=30.0)
    leases = enter(coordinator, "g", 8)
    enter(coordinator, "h", 0)
    give(coordinator, *leases)
    step(coordinator, coordinator.take(2, 0, 1.0))  # published at 2
    coordinator.applied("g", applied(1), 3.0)
    assert coordinator.tickets.num_free == 0
    assert coordinator.tick(32.0) == ["h: did not apply version 1 in 30 s; it gets no groups until it does"]
    assert coordinator.tickets.num_free == 2
    coordinator.applied("h", applied(1), 33.0)
    coordinator.request("h", 2, 33.0)
    assert len(coordinator.grants(33.0)["h"]) == 1


def test_a_generator_that_applies_before_the_publish_is_heard_owes_nothing(tmp_path: Path) -> None:
    """The weights lie ready before the learner says so, and a generator that joins just then finds them."""
    coordinator = begun(tmp_path, lease_s=100.0, publish_s=30.0)
    give(coordinator, *enter(coordinator, "g", 8))
    taken = coordinator.take(2, 0, 1.0)
    assert taken is not None
    coordinator.trained(Trained(1, [group.group_id for group in taken.groups], "trained"))
    coordinator.applied("g", applied(1), 2.0)
    coordinator.published(1, 2.0)
    assert coordinator.tick(33.0) == []
    coordinator.request("g", 4, 33.0)
    assert len(coordinator.grants(33.0)["g"]) == 2


def test_weights_older_than_what_is_settled_do_not_route(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.applied("g", applied(1), 2.0)
    coordinator.leave("g", "left", 2.0)
    coordinator.join("h", 2.0)
    coordinator.applied("h", applied(0), 2.0)
    coordinator.request("h", 8, 2.0)
    assert coordinator.grants(2.0) == {}
    coordinator.applied("h", applied(1), 2.0)
    assert [lease.version for lease in coordinator.grants(2.0)["h"]] == [1, 1]
