"""Blocks of memory, of this host or of one of its GPUs, that other processes of the host open by a handle.

A handle is 64 bytes that say nothing of torch's version, and nobody counts who holds them: who dies lets go, and who
allocated a block gives it back. On GPUs that is CUDA IPC, on memory of the CUDA runtime's own, outside of torch's
allocator. torch shares memory too, but counts one reader for each time that it does, so one that is killed keeps the
memory for ever (pytorch issue 145703); and of expandable segments it hands out descriptors, which only a process that
may trace the other can take.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

HANDLE_BYTES = 64
SHARED_ALONE = 2 << 20  # bytes: smaller allocations share one such, and with it a handle
WITH_PEERS = 1  # cudaIpcMemLazyEnablePeerAccess


@dataclass(frozen=True)
class Block:
    """`tensor`, uint8 [bytes], is of no more use after `close`, which is also for those who opened it by `handle`."""

    tensor: Tensor
    handle: bytes
    close: Callable[[], None]


class Allocator(Protocol):
    device: torch.device

    def allocate(self, num_bytes: int) -> Block:
        """New memory, at least a byte. Raises `RuntimeError`."""
        ...

    def open(self, handle: bytes, num_bytes: int) -> Block:
        """What another process of this host allocated; on whichever GPU that was, it is addressed as one of `device`.
        Raises `RuntimeError` where it is gone or out of reach."""
        ...


def allocator(device: torch.device) -> Allocator:
    """Raises `RuntimeError` where this host does not have the device."""
    return Host() if device.type == "cpu" else Cuda(device)


class Host:
    """Files without a name; a handle is the way to one through the process that allocated it, and its number."""

    device = torch.device("cpu")

    def allocate(self, num_bytes: int) -> Block:
        fd = os.memfd_create("leeway")
        os.truncate(fd, num_bytes)
        handle = f"/proc/{os.getpid()}/fd/{fd} {os.fstat(fd).st_ino}".encode().ljust(HANDLE_BYTES)
        return Block(_mapped(fd, num_bytes), handle, partial(os.close, fd))

    def open(self, handle: bytes, num_bytes: int) -> Block:
        path, number = handle.decode().split()
        try:
            with open(path, "r+b") as file:
                if os.fstat(file.fileno()).st_ino != int(number):
                    raise RuntimeError(f"{path} is another's by now")
                return Block(_mapped(file.fileno(), num_bytes), handle, lambda: None)
        except OSError as error:
            raise RuntimeError(f"{path} is gone: {error.strerror}") from error


def _mapped(fd: int, num_bytes: int) -> Tensor:
    pages = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)  # else they are looked for when used
    return torch.from_numpy(np.frombuffer(pages, np.uint8))


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class Cuda:
    """Memory of a GPU, by the CUDA runtime that torch has loaded."""

    def __init__(self, device: torch.device):
        if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
            raise RuntimeError(f"{str(device)!r} is no CUDA device of this host")
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", self._index)
        self._runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")

    def allocate(self, num_bytes: int) -> Block:
        pointer, handle = ctypes.c_void_p(), _Handle()
        room = -(-num_bytes // SHARED_ALONE) * SHARED_ALONE
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(room))
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
        return Block(self._tensor(pointer, num_bytes), bytes(handle), partial(self._call, "cudaFree", pointer))

    def open(self, handle: bytes, num_bytes: int) -> Block:
        pointer, theirs = ctypes.c_void_p(), _Handle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(pointer), theirs, ctypes.c_uint(WITH_PEERS))
        close = partial(self._call, "cudaIpcCloseMemHandle", pointer)
        return Block(self._tensor(pointer, num_bytes), handle, close)

    def _tensor(self, pointer: ctypes.c_void_p, num_bytes: int) -> Tensor:
        assert pointer.value is not None
        storage = torch._C._construct_storage_from_data_pointer(pointer.value, self.device, num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self._index):
            if code := self._runtime[name](*arguments):
                self._runtime.cudaGetLastError()  # else torch's next kernel would be blamed for it
                raise RuntimeError(f"{name}: CUDA error {code}")
