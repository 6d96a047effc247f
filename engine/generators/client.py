"""SGLang's HTTP interface, as much of it as a generator needs; checked against 0.5.18."""

import base64
import pickle
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import torch

from engine.config import Config, ConfigError

LOADER = "engine.generators.guest.load"  # SGLang imports it by this path


class ServerError(RuntimeError):
    """The server refused (`status` is HTTP's), said something unexpected, or is gone (0)."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class Reason(msgspec.Struct, frozen=True):
    type: str  # "stop", "length" or "abort"
    message: str = ""


class Meta(msgspec.Struct, frozen=True):
    """Of a stream's piece: `completion_tokens` counts from the request's start."""

    weight_version: str
    completion_tokens: int
    finish_reason: Reason | None
    output_token_logprobs: list[tuple[float | None, int, str | None]] = []
    cached_tokens: int = 0


class Refusal(msgspec.Struct, frozen=True):
    message: str


class Piece(msgspec.Struct, frozen=True):
    """One message of a stream."""

    meta_info: Meta | None = None
    error: Refusal | None = None


class Client:
    """Talks to the server at `url`; used from one event loop alone. Raises `ServerError`."""

    def __init__(self, url: str, api_key: str):
        self.url = url
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = aiohttp.ClientTimeout(total=None)  # the loop's deadlines hold
        self._session = aiohttp.ClientSession(
            url, headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
        )
        self._decoder = msgspec.json.Decoder(Piece)

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[Meta]:
        """The pieces of one streamed completion, the last with a `finish_reason`."""
        try:
            async with self._session.post("/generate", json={**request, "stream": True}) as answer:
                if answer.status != 200:
                    raise ServerError(
                        f"{self.url}/generate: {answer.status} {(await answer.text())[:500]}", answer.status
                    )
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        piece = self._decoder.decode(line[len(b"data: ") :])
                        if piece.meta_info is None:
                            raise ServerError(f"{self.url}/generate: {piece.error and piece.error.message}")
                        yield piece.meta_info
        except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
            raise ServerError(f"{self.url}/generate: {type(error).__name__}: {error}") from error

    async def abort(self, request_id: str) -> None:
        """Ends one request, whose stream then ends with "abort"; unknown ones are ignored."""
        await self._post("/abort_request", {"rid": request_id})

    async def abort_all(self) -> None:
        await self._post("/abort_request", {"abort_all": True})

    async def update(self, label: str, order: str, num_ranks: int) -> None:
        """Has each of `num_ranks` tensor-parallel ranks load what `order` describes to `guest.load`; requests from then
        on say that their weights are `label`. Waits for requests under way: abort them first.

        SGLang takes names and tensors pickled, and unpickles by a list of what is allowed: this carries one name.
        """
        pickled = base64.b64encode(pickle.dumps([(order, torch.zeros(0))])).decode()
        await self._post(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": [pickled] * num_ranks,
                "load_format": LOADER,
                "flush_cache": False,
                "weight_version": label,
            },
        )

    async def info(self) -> dict[str, Any]:
        """The arguments that the server was started with."""
        return msgspec.json.decode(await self._request("GET", "/server_info"))

    async def close(self) -> None:
        await self._session.close()

    async def _post(self, path: str, body: dict[str, Any]) -> bytes:
        return await self._request("POST", path, json=body)

    async def _request(self, method: str, path: str, **options: Any) -> bytes:
        try:
            async with self._session.request(method, path, **options) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        if answer.status != 200:
            raise ServerError(f"{self.url}{path}: {answer.status} {body[:500].decode(errors='replace')}", answer.status)
        return body


# What a server must have been started with, by the field that asks for it.
FLAGS = {
    "generator.sglang.deterministic": ("enable_deterministic_inference", lambda c: c.generator.sglang.deterministic),
    "model.fp32_head": ("enable_fp32_lm_head", lambda c: c.model.fp32_head and c.generator.dtype != "float32"),
}


def check_served(info: dict[str, Any], config: Config) -> None:
    """Raises `ConfigError` for a server that cannot be used, or not as wanted, by what it says of itself."""
    if LOADER not in (info.get("custom_weight_loader") or ()):
        raise ConfigError(
            f"generator.sglang.url: the server there was not started with --custom-weight-loader {LOADER}"
        )
    for field, (name, asked) in FLAGS.items():
        if asked(config) and not info.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{field} = true: the server at generator.sglang.url was not started with {flag}")
