"""The torch operators `torch.ops.leeway.*`: importing this module loads them.

Their CPU kernels are part of `_ops.so`; their CUDA kernels are the library `_cuda.so`, which exists where nvcc was at
hand and needs neither CUDA nor torch to load.
"""

import ctypes
from pathlib import Path

import torch

_DIRECTORY = Path(__file__).resolve().parent
_CUDA = _DIRECTORY / "_cuda.so"


def cuda_is_built() -> bool:
    """Whether the CUDA kernels are there; a device to run them on is another matter."""
    return _CUDA.exists()


def _load() -> None:
    try:
        torch.ops.load_library(_DIRECTORY / "_ops.so")
    except OSError as error:
        raise ImportError(f"engine.ops._ops cannot be loaded ({error}); `make install` builds it") from error
    if cuda_is_built():
        cuda = ctypes.CDLL(str(_CUDA), mode=ctypes.RTLD_GLOBAL)  # in sight of _ops, which looks its functions up
        if cuda.leeway_abi() != torch.ops.leeway.abi():
            raise ImportError("engine.ops._cuda and engine.ops._ops differ in age; `make install` builds both")


_load()
