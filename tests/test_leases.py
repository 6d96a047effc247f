"""Leases that end without a result, and go to others."""

from pathlib import Path

import fake_run
from fake_run import applied, beat, begun, enter, give

from engine.schema import Failure, Granted, Heartbeat, Lapsed


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
    coordinator.applied("h", applied(1), 21.0)
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
    assert coordinator.state().ends["failed"] == 1
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
    assert coordinator.state().leased_groups == 2
    coordinator.heartbeat("g", held, 8.0)
    assert coordinator.state().leased_groups == 1
    coordinator.request("g", 2, 8.0)
    assert [(lease.group_id, lease.attempt) for lease in coordinator.grants(8.0)["g"]] == [(0, 2)]


def test_heartbeats_that_crossed_a_lease_do_not_lose_it(tmp_path: Path) -> None:
    """One comes after every applied version, close behind another; and one at the end of a turn begun before."""
    coordinator = begun(tmp_path, heartbeat_s=2.0)
    enter(coordinator, "g", 4, now=10.0)
    for now in (10.001, 10.002, 13.0):
        coordinator.heartbeat("g", Heartbeat([], 0, 0.0, 0.0), now)
        assert coordinator.state().leased_groups == 2
    coordinator.heartbeat("g", Heartbeat([], 0, 0.0, 0.0), 15.0)
    assert coordinator.state().leased_groups == 0


def test_a_lease_held_too_long_is_taken_back(tmp_path: Path) -> None:
    coordinator = begun(tmp_path, lease_s=100.0, group_s=50.0)
    enter(coordinator, "g", 2, now=10.0)
    assert coordinator.next_deadline() == 60.0
    coordinator.tick(60.0)
    assert coordinator.state().leased_groups == 0


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
    assert coordinator.state().leased_groups == 0
