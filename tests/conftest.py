import sys
from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
