"""The coordinator's part of a checkpoint: a resume goes on from it."""

from pathlib import Path

import pytest
from fake_run import applied, begun, enter, give, step

from engine.config import ConfigError


def test_a_resume_goes_on_from_the_snapshot(tmp_path: Path) -> None:
    coordinator = begun(tmp_path)
    leases = enter(coordinator, "g", 8)
    give(coordinator, *leases[:3])
    step(coordinator, coordinator.take(2, 0, 1.0))
    coordinator.evaluate("step 1", "eval", False, 2.0)
    snapshot = coordinator.snapshot(step=1)  # 0, 1 trained; 2 buffered; 3 leased
    give(coordinator, leases[3])
    step(coordinator, coordinator.take(2, 1, 3.0))
    coordinator.applied("g", applied(1), 3.0)
    coordinator.request("g", 99, 3.0)
    assert 4 in [lease.group_id for lease in coordinator.grants(3.0)["g"]]  # drawn, and will be undone
    coordinator._ledger.close()

    resumed = begun(tmp_path, snapshot=snapshot)
    assert (resumed.incarnation, resumed.version) == (1, 1)
    assert resumed.state().ends == {
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
