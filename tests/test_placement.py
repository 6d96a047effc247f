"""Who does what: roles, generator children and threads for one rank, several ranks and several hosts."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import learning
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from engine import placement
from engine.config import ConfigError
from engine.placement import Seat, check_route, join_learners, limit_collectives, rendezvous, seat


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def seats(*hosts: int, overrides: tuple[str, ...] = ()) -> list[Seat]:
    """The seats of all ranks where torchrun starts `hosts[i]` of them on host i."""
    config = learning.configure(*overrides)
    places = [(local, size) for size in hosts for local in range(size)]
    return [
        seat(
            config,
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(size),
            },
        )
        for rank, (local, size) in enumerate(places)
    ]


def test_generators_take_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [each.child_gpus for each in seats(3)] == [[], [], ["2"]]
    assert [each.device for each in seats(3)] == ["cuda:0", "cuda:1", "cuda:2"]
    lead, other = seats(2, overrides=("placement.learners=2", "generator.local=3"))
    assert (lead.child_gpus, other.child_gpus) == (["2", "3", "0"], [])  # more than there are GPUs: some share
    assert seat(learning.configure(), {"CUDA_VISIBLE_DEVICES": "5,GPU-7f"}).child_gpus == ["GPU-7f"]
    assert seat(learning.configure("generator.device='cpu'"), {}).child_gpus == []


def test_a_tensor_parallel_generator_takes_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    wide = ("generator.engine=sglang", "generator.gpus=2")
    one_host = seats(4, overrides=(*wide, "placement.learners=2"))
    assert [each.child_gpus for each in one_host] == [[], [], ["2,3"], ["4,5"]]
    other_host = seats(2, 2, overrides=(*wide, "placement.learners=2"))
    assert [each.child_gpus for each in other_host] == [[], [], ["0,1"], ["2,3"]]
    lead = seats(2, overrides=(*wide, "placement.learners=2", "generator.local=3"))[0]
    assert lead.child_gpus == ["2,3", "4,5", "6,7"]
    with pytest.raises(ConfigError, match="generator.gpus = 9: this host shows 8"):
        seats(2, overrides=("generator.engine=sglang", "generator.gpus=9"))


def test_without_torchrun_one_rank_learns_and_supervises() -> None:
    alone = seat(learning.configure(), {})
    assert alone == seats(1)[0]
    assert (alone.rank, alone.world_size, alone.role, alone.device) == (0, 1, "learner", "cpu")
    assert (alone.num_learners, alone.num_children) == (1, 1)
    assert (alone.threads, alone.child_threads) == (4, 4)


def test_of_several_ranks_all_but_one_learn() -> None:
    two, three = seats(2), seats(3)
    assert [each.role for each in two] == ["learner", "generator"]
    assert [each.role for each in three] == ["learner", "learner", "generator"]
    assert [each.num_children for each in three] == [0, 0, 1]
    assert [each.threads for each in two + three] == [4, 4, 2, 2, 2]  # a supervisor's child computes in its place


def test_where_all_ranks_learn_the_first_supervises() -> None:
    both = seats(2, overrides=("placement.learners=2", "generator.local=2"))
    assert [each.role for each in both] == ["learner", "learner"]
    assert [each.num_children for each in both] == [2, 0]
    assert [(each.threads, each.child_threads) for each in both] == [(2, 2), (2, 2)]


def test_each_host_divides_its_own_cores() -> None:
    learners = seats(2, 1, overrides=("placement.learners=3", "generator.local=2"))
    assert [each.num_children for each in learners] == [2, 0, 0]
    assert [each.threads for each in learners] == [2, 2, 8]
    mixed = seats(2, 2, overrides=("placement.learners=2",))
    assert [(each.role, each.num_children) for each in mixed] == [("learner", 0)] * 2 + [("generator", 1)] * 2
    assert [each.child_threads for each in mixed] == [4, 4, 4, 4]


def test_more_processes_than_cores_have_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cores", lambda: 2)
    assert [(each.threads, each.child_threads) for each in seats(3)] == [(1, 1)] * 3


def test_threads_and_device_as_configured() -> None:
    (only,) = seats(1, overrides=("learner.threads=3", "generator.threads=5", "learner.device=cuda:7"))
    assert (only.threads, only.child_threads, only.device) == (3, 5, "cuda:7")


def test_each_rank_has_the_device_of_its_place_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [each.device for each in seats(2, 2)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_several_learners_of_a_host_are_not_given_one_gpu() -> None:
    message = "learner.device = 'cuda:0': one GPU for 2 learner ranks; 'cuda' gives each its own"
    with pytest.raises(ConfigError, match=message):
        seats(3, overrides=("learner.device=cuda:0",))
    assert [each.device for each in seats(2, overrides=("learner.device=cuda:0",))] == ["cuda:0"] * 2  # one learns


@pytest.mark.parametrize("learners", [-1, 3])
def test_learners_must_fit_the_ranks(learners: int) -> None:
    with pytest.raises(ConfigError, match=rf"placement.learners = {learners}: must be between 1 and .* 2$"):
        seats(2, overrides=(f"placement.learners={learners}",))


def test_one_learner_on_a_cpu_needs_neither_store_nor_group() -> None:
    (only,) = seats(1)
    assert rendezvous(only, 1.0) is None
    join_learners(only, None, 1.0)
    assert not torch.distributed.is_initialized()


def test_ranks_meet_in_one_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda each: rendezvous(each, 20.0), seats(2))
    assert first is not None and second is not None
    first.set("run", "here")
    assert second.get("run") == b"here"


COLLECTIVE_S, PREPARE_S = 0.5, 60.0


def _on_rank(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    seat = Seat(rank, 2, rank, num_learners=2, num_children=0, device="cpu", threads=1, child_threads=1)
    join_learners(seat, store, PREPARE_S)
    if rank == 0:
        time.sleep(4 * COLLECTIVE_S)  # reads its model
    count = torch.ones(1)
    dist.all_reduce(count)
    limit_collectives(COLLECTIVE_S)
    if rank == 0:
        store.wait(["late"], timedelta(seconds=PREPARE_S))
        Path(folder, "count").write_text(str(count.item()))
    else:
        with pytest.raises(RuntimeError):  # rank 0 never comes
            dist.all_reduce(count)
        store.set("late", "")


def test_rank_0_may_prepare_for_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    start_processes(_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    assert (tmp_path / "count").read_text() == "2.0"
GPUS = ("weights.route='cuda_ipc'",)


@pytest.mark.parametrize(
    ("hosts", "overrides", "message"),
    [
        ((2,), ("learner.device='cpu'",), "but learner.device is 'cpu'"),
        ((2,), ("generator.device='cpu'",), "but generator.device is 'cpu'"),
        ((1, 1), (), "but 1 of 2 ranks are on others"),
        ((2,), (), "by our CUDA kernels"),
    ],
)
def test_weights_go_from_gpu_to_gpu_of_one_host_alone(
    monkeypatch: pytest.MonkeyPatch, hosts: tuple[int, ...], overrides: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "cuda_is_built", lambda: "kernels" not in message)
    place, environ = seats(*hosts, overrides=GPUS + overrides)[0], {"LOCAL_WORLD_SIZE": str(hosts[0])}
    with pytest.raises(ConfigError, match=f"weights.route = 'cuda_ipc': goes from GPU to GPU of one host,? {message}"):
        check_route(learning.configure(*GPUS, *overrides), place, environ)
    check_route(learning.configure(*overrides), place, environ)  # by "auto" it may


def test_weights_go_from_gpu_to_gpu_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="but learner.device is 'cpu'"):
        check_route(learning.configure(*GPUS), seats(1, overrides=GPUS)[0], {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "cuda_is_built", lambda: True)
    check_route(learning.configure(*GPUS), seats(1, overrides=GPUS)[0], {})
    check_route(learning.configure(*GPUS), seats(3, overrides=GPUS)[0], {"LOCAL_WORLD_SIZE": "3"})
