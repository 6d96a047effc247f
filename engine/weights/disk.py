"""Versions as safetensors files in a directory that learner and generators see: for hosts that share nothing else.

`DIRECTORY/SEGMENT-INCARNATION-VERSION.safetensors` is written under another name and renamed when whole, so what has
the name is whole; its metadata hold the manifest and the payload's digest. The newest two stay.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.ops import buckets
from engine.weights.manifest import HOST, Manifest, WeightsError
from engine.weights.segment import NUM_SLOTS, Header, Overwritten, Part

SUFFIX = ".safetensors"


def write(directory: Path, segment: str, header: Header, manifest: Manifest, payload: torch.Tensor) -> None:
    """Makes a version readable there, and removes those before the newest two. Raises `WeightsError`."""
    path = directory / f"{segment}-{header.incarnation}-{header.version}{SUFFIX}"
    metadata = {"manifest": manifest.encode().decode(), "header": msgspec.json.encode(header).decode()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(manifest.views(payload), path.with_suffix(".part"), metadata)
        path.with_suffix(".part").rename(path)
        for old in _found(directory, segment)[NUM_SLOTS:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"weights.directory = {str(directory)!r}: {error}") from error


def remove(directory: Path, segment: str) -> None:
    for path in directory.glob(f"{segment}-*"):
        path.unlink(missing_ok=True)


class DiskSource:
    """A `Source` over what the publisher of `segment` writes to `directory`."""

    far = True
    device = HOST

    def __init__(self, directory: Path, segment: str):
        self._directory, self._segment = directory, segment
        paths = _found(directory, segment)
        if not paths:
            raise WeightsError(f"weights.directory = {str(directory)!r}: holds no version of {segment}")
        self.manifest = Manifest.decode(_metadata(paths[0])["manifest"].encode())

    def headers(self) -> list[Header]:
        found = []
        for path in _found(self._directory, self._segment):
            try:
                found.append(msgspec.json.decode(_metadata(path)["header"], type=Header))
            except Overwritten:  # removed meanwhile
                continue
        return found

    def read(self, header: Header, part: Part, into: torch.Tensor) -> Iterator[tuple[slice, int]]:
        path = self._directory / f"{self._segment}-{header.incarnation}-{header.version}{SUFFIX}"
        into.zero_()  # between tensors
        views = self.manifest.views(into)
        try:
            with safe_open(path, framework="pt") as file:
                for name, view in views.items():
                    view.copy_(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise Overwritten from error
        yield slice(0, len(into)), int(buckets.checksum(into))

    def close(self) -> None:
        pass


def _found(directory: Path, segment: str) -> list[Path]:
    """The whole versions, newest first."""

    def age(path: Path) -> tuple[int, int]:
        incarnation, version = path.stem.removeprefix(f"{segment}-").split("-")
        return int(incarnation), int(version)

    return sorted(directory.glob(f"{segment}-*{SUFFIX}"), key=age, reverse=True)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()
    except (OSError, SafetensorError) as error:
        raise Overwritten from error
