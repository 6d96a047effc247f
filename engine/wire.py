"""The binary form of what travels: a msgpack header and any number of buffers.

Arrays never enter the header: `encode` puts each into a frame of its own and leaves (dtype, shape, frame number)
behind, so a group of many thousand tokens costs microseconds to decode.
"""

from typing import Any

import msgspec
import numpy as np

from engine.schema import Result

DTYPES = frozenset({"<i4", "<i8", "<f4", "<f8", "|u1", "|b1"})  # of an array


def encode(message: Any) -> list[Any]:
    """`message` as frames: the msgpack header, then one buffer an array (not copied where it lies contiguous)."""
    frames: list[Any] = [b""]

    def lift(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a {type(value).__name__} cannot travel: {value!r}")
        if value.dtype.str not in DTYPES:
            raise TypeError(f"an array of {value.dtype} cannot travel; allowed: {', '.join(sorted(DTYPES))}")
        frames.append(np.ascontiguousarray(value).data)
        return [value.dtype.str, list(value.shape), len(frames) - 1]

    frames[0] = msgspec.msgpack.encode(message, enc_hook=lift)
    return frames


def decode(frames: list[Any], kind: Any) -> Any:
    """The message of type `kind` that `frames` hold. Arrays are read-only views of the frames.

    Raises `msgspec.DecodeError` for frames that are none: a header that does not fit `kind`, an unknown dtype, a frame
    of the wrong size.
    """

    def land(expected: type, value: Any) -> Any:
        if expected is not np.ndarray:
            raise NotImplementedError(expected)
        dtype, shape, number = value
        if dtype not in DTYPES:
            raise ValueError(f"an array of {dtype} on the wire")
        return np.frombuffer(frames[number], dtype=dtype).reshape(shape)

    try:
        message = msgspec.msgpack.decode(frames[0], type=kind, dec_hook=land)
        if isinstance(message, Result):
            message.group.check()
        return message
    except (ValueError, TypeError, IndexError, RecursionError) as error:  # a DecodeError is a ValueError
        raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from error
