import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# A thread that spins until the next one is done takes seconds from a test where other processes want the same core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One list for all: a process of tests has one fork server, of which the ranks are forks.
multiprocessing.set_forkserver_preload(["engine.learner", "torch.distributed.fsdp", "torch.distributed.checkpoint"])

if TYPE_CHECKING:
    from engine.weights import Publisher, Subscriber


@pytest.fixture(params=["shm", "tcp"])
def subscriber(request: pytest.FixtureRequest, publisher: "Publisher") -> "Iterator[Subscriber]":
    """Stages what the file's `publisher` publishes, by every route."""
    from engine.weights import Server, subscribe

    with closing(Server(publisher.name, "127.0.0.1")) as server:
        address = f"tcp://127.0.0.1:{server.port}"
        with closing(subscribe(request.param, segment=publisher.name, host="", address=address, timeout_s=5)) as it:
            yield it


@pytest.fixture(scope="session")
def warm() -> Iterator[list[str]]:
    """Overrides of a configuration whose SGLang servers start in two seconds."""
    from sglang_server import warmed

    with warmed() as overrides:
        yield overrides


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a launch within the test would make its run; its signal handlers and switches do not outlive the test."""
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path / "runs"
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refusal(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function: the line with which a launch with these arguments ends."""
    from refused import refused

    return lambda *arguments, **options: refused(root, capsys, arguments, **options)


# Where tests run side by side (-n 2), one process at a time starts jobs, which compute on all cores; SGLang is imported
# once; and a file is never torn. Long ones come first.
LANES = {
    **dict.fromkeys(
        ["test_chaos.py", "test_five_domains.py", "test_job.py", "test_recipes.py", "test_synchronous.py"], "jobs"
    ),
    **dict.fromkeys(["test_sglang.py", "test_sglang_head.py", "test_sglang_job.py", "test_sglang_kill.py"], "sglang"),
    "test_driver.py": "driver",
}


def lane(nodeid: str) -> str:
    file = nodeid.partition("::")[0].rpartition("/")[2]
    return LANES.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByLane(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid)

    config.option.loadscopereorder = False
    return ByLane(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = list(LANES.values())
        items.sort(key=lambda item: order.index(lane(item.nodeid)) if lane(item.nodeid) in order else len(order))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def no_sandbox_outlives_its_module() -> Iterator[None]:
    """The reward `code` keeps a thread's sandboxes for the next program."""
    yield
    if trial := sys.modules.get("rewards.code.trial"):
        trial.close_sandboxes()
