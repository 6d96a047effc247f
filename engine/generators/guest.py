"""What of Leeway runs inside SGLang's own environment: the start of a server, and the loading of weights into it.

    PYTHON -m engine.generators.guest < options.json

SGLang is imported here alone, and of the engine nothing but `process`, which needs the standard library only, and
`blocks`, which needs torch.
"""

import functools
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from engine.process import PARENT, die_with_parent

if TYPE_CHECKING:
    from engine.blocks import Block

_opened: "dict[str, Block]" = {}  # by handle, so that it is not opened again at every version


def load(model: Any, named_tensors: list[tuple[str, Any]]) -> None:
    """SGLang's custom weight loader: copies a whole version out of memory shared with the generator into `model`.

    The only name is JSON: `device`, `handle` and `num_bytes` of the memory, and `tensors` as [name, dtype, shape,
    offset in bytes]. The model's own `load_weights` finds each one's place, in every tensor-parallel rank the part that
    is its.
    """
    import torch

    [(description, _)] = named_tensors
    order = json.loads(description)
    payload = _memory(order["device"], order["handle"], order["num_bytes"])

    def views() -> Any:
        for name, dtype, shape, offset in order["tensors"]:
            kind = getattr(torch, dtype)
            size = functools.reduce(int.__mul__, shape, kind.itemsize)
            yield name, payload[offset : offset + size].view(kind).view(shape)

    model.load_weights(views())
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the answer means that the memory may be written again


def _memory(device: str, handle: str, num_bytes: int) -> Any:
    """The generator's memory, uint8 [num_bytes]; an earlier generator's is let go."""
    import torch

    from engine.blocks import allocator

    if handle not in _opened:
        while _opened:
            _opened.popitem()[1].close()
        _opened[handle] = allocator(torch.device(device)).open(bytes.fromhex(handle), num_bytes)
    return _opened[handle].tensor


def belong() -> None:
    """This process dies with its parent, and the children that it starts, which run this before all else, with it."""
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())


def main() -> None:
    options = json.load(sys.stdin)
    from sglang.srt.entrypoints.http_server import launch_server  # type: ignore[import-not-found]
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]

    launch_server(ServerArgs(**options))


if __name__ in ("__main__", "__mp_main__"):  # a child that SGLang starts imports for long before it does so itself
    belong()
if __name__ == "__main__":
    main()
