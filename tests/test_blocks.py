"""Blocks that another process opens, and what a dead one leaves. CUDA's calls go to `cudart.c`, on the host."""

import ctypes
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.blocks import HANDLE_BYTES, Allocator, Cuda, Host, allocator

HOST = torch.device("cpu")
NUM_BYTES = 5_000_000
_fork = multiprocessing.get_context("fork")


class OnHost(Cuda):
    """CUDA's allocator over another runtime, which knows no devices."""

    def __init__(self, runtime: str):
        self.device, self._index = HOST, -1
        self._runtime = ctypes.CDLL(runtime)


@pytest.fixture(scope="module", params=["host", "cuda"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Allocator:
    if request.param == "host":
        return Host()
    runtime = str(tmp_path_factory.mktemp("cudart") / "libcudart.so")
    source = Path(__file__).with_name("cudart.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", runtime, source], check=True)
    return OnHost(runtime)


def elsewhere(work: Callable[[], object]) -> int | None:
    """The exit code of a process that does `work`."""

    def alone() -> None:
        torch.set_num_threads(1)  # the parent's others did not come along
        work()

    process = _fork.Process(target=alone, daemon=True)
    process.start()
    process.join(20)
    return process.exitcode


def test_a_block_is_opened_by_its_handle(made: Allocator) -> None:
    block = made.allocate(NUM_BYTES)
    assert (block.tensor.shape, block.tensor.dtype) == ((NUM_BYTES,), torch.uint8)
    assert len(block.handle) == HANDLE_BYTES
    block.tensor.fill_(7)

    def answer() -> None:
        opened = made.open(block.handle, NUM_BYTES)
        assert opened.tensor.unique().tolist() == [7] and len(opened.tensor) == NUM_BYTES
        opened.tensor[-1] = 8
        opened.close()

    assert elsewhere(answer) == 0
    assert block.tensor[-1] == 8 and block.tensor[:-1].unique().tolist() == [7]
    block.close()


def test_blocks_are_apart(made: Allocator) -> None:
    blocks = [made.allocate(1) for _ in range(3)]
    opened = [made.open(block.handle, 1) for block in blocks]
    for number, block in enumerate(blocks):
        block.tensor.fill_(number)
    assert [int(block.tensor) for block in opened] == [0, 1, 2]
    for block in (*opened, *blocks):
        block.close()


def test_what_a_dead_process_allocated_is_gone_for_who_comes_and_there_for_who_has_it(made: Allocator) -> None:
    ours, theirs = _fork.Pipe()

    def allocate() -> None:
        torch.set_num_threads(1)
        block = made.allocate(NUM_BYTES)
        block.tensor.fill_(9)
        theirs.send(block.handle)
        theirs.recv()
        os._exit(0)

    process = _fork.Process(target=allocate, daemon=True)
    process.start()
    handle = ours.recv()
    opened = made.open(handle, NUM_BYTES)
    process.kill()
    process.join(20)
    assert opened.tensor.unique().tolist() == [9]
    with pytest.raises(RuntimeError, match="is gone: No such file|cudaIpcOpenMemHandle: CUDA error 206"):
        made.open(handle, NUM_BYTES)
    if isinstance(made, Cuda):
        assert made._runtime.cudaPeekAtLastError() == 0  # of which torch would ask after its next kernel
    opened.close()


def test_a_file_that_another_has_by_now_is_refused() -> None:
    first = Host().allocate(1)
    first.close()
    second = Host().allocate(1)  # by the same way
    assert second.handle.split()[0] == first.handle.split()[0]
    with pytest.raises(RuntimeError, match="is another's by now"):
        Host().open(first.handle, 1)
    second.close()


def test_an_allocator_is_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(allocator(HOST), Host)
    for device in ("cuda", "cuda:3", "meta"):
        with pytest.raises(RuntimeError, match=f"'{device}' is no CUDA device of this host"):
            allocator(torch.device(device))
