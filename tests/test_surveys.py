"""Evaluations and probes beside training."""

from pathlib import Path

from fake_run import applied, begun, enter, give, step


def test_an_evaluation_that_is_waited_for_stands_alone_and_is_pinned(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    give(coordinator, *enter(coordinator, "g", 8))
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.evaluate("after", "eval", True, 2.0)
    coordinator.request("g", 99, 2.0)
    assert coordinator.grants(2.0) == {}  # version 1 is published, but not applied
    coordinator.applied("g", applied(1), 2.0)
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
    state = coordinator.state()
    assert [evaluation.name for evaluation in state.completed_evaluations] == ["step 1"]
    assert (state.buffered_groups, state.ends["drawn"]) == (4, 4)
    assert coordinator.state().completed_evaluations == []


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
