"""A language model behind an OpenAI-compatible endpoint, asked asynchronously."""

import asyncio
import hashlib
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from rewards.options import Count, Natural, Positive, Unsigned

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # statuses after which the same request may succeed
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # before the second attempt, and before any


class EndpointError(RuntimeError):
    """The endpoint gave no answer: it refused, or none of the attempts within the deadline succeeded."""


class Reply(msgspec.Struct, frozen=True):
    """One answer and what it took; `attempts` is 0 and `seconds` and the tokens are 0 where the cache had it."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    attempts: int = 0


class Endpoint:
    """Asks `model` at `url` (".../v1"), at most `concurrency` requests at once, each with its retries within
    `deadline_s` of its turn. `key_env` names the environment variable that holds the key. Answers are kept in the
    directory `cache`, by the hash of model and request; give another endpoint of the same model's name another one.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        key_env: str = "",
        concurrency: Count = 32,
        retries: Natural = 5,
        deadline_s: Positive = 120.0,
        cache: str = "",
        first_wait_s: Unsigned = FIRST_WAIT_S,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url = {url!r}: must begin with http:// or https://")
        self._url, self._model = url.rstrip("/") + "/chat/completions", model
        self._key_env, self._retries, self._deadline_s = key_env, retries, deadline_s
        self._first_wait_s = first_wait_s
        self._cache = Path(cache).expanduser() if cache else None
        self._turns = asyncio.Semaphore(concurrency)
        self._limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client: httpx.AsyncClient | None = None

    async def ask(self, messages: list[dict[str, str]], **sampling: Any) -> Reply:
        """The model's answer to `messages`. Raises `EndpointError`."""
        request = {"model": self._model, "messages": messages, **sampling}
        place = self._place(request)
        if place is not None and place.exists():
            return msgspec.json.decode(place.read_bytes(), type=Reply)
        async with self._turns:
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._deadline_s):
                    body, attempts = await self._send(request)
            except TimeoutError:
                raise EndpointError(f"{self._url}: no answer within {self._deadline_s:g} s") from None
        reply = _reply(self._url, body)
        if place is not None:
            _keep(place, msgspec.json.encode(reply))
        return msgspec.structs.replace(
            reply,
            **{key: int(body.get("usage", {}).get(name) or 0) for key, name in USAGE.items()},
            seconds=time.monotonic() - started,
            attempts=attempts,
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _send(self, request: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The answer's body, and how many attempts it took."""
        client = self._client = self._connect() if self._client is None else self._client
        for attempt in range(self._retries + 1):
            try:
                response = await client.post(self._url, json=request)
                if response.status_code == 200:
                    return response.json(), attempt + 1
                problem = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code not in AGAIN:
                    break
                wait_s = _asked_wait_s(response)
            except (httpx.TransportError, ValueError) as error:
                problem, wait_s = f"{type(error).__name__}: {error}", 0.0
            if attempt < self._retries:
                backoff_s = min(LONGEST_WAIT_S, self._first_wait_s * 2**attempt) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(wait_s, backoff_s))
        raise EndpointError(f"{self._url}: {problem}")

    def _connect(self) -> httpx.AsyncClient:
        """Called within the event loop that uses it, in the process that does."""
        key = os.environ.get(self._key_env, "") if self._key_env else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(headers=headers, limits=self._limits, timeout=self._deadline_s)

    def _place(self, request: dict[str, Any]) -> Path | None:
        if self._cache is None:
            return None
        digest = hashlib.sha256(msgspec.json.encode(request, order="sorted")).hexdigest()
        return self._cache / digest[:2] / f"{digest[2:]}.json"


USAGE = {"prompt_tokens": "prompt_tokens", "tokens": "completion_tokens"}


def _reply(url: str, body: dict[str, Any]) -> Reply:
    try:
        choice = body["choices"][0]
        return Reply(str(choice["message"]["content"] or ""), str(choice.get("finish_reason") or "stop"))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise EndpointError(f"{url}: an answer of another form: {str(body)[:200]}") from error


def _asked_wait_s(response: httpx.Response) -> float:
    """The wait that the server asks for; its other form, a date, is left to the back-off."""
    try:
        return min(LONGEST_WAIT_S, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _keep(place: Path, content: bytes) -> None:
    """Whole or not at all: other processes share the directory."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, place)
