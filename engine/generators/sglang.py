"""A generator that is an SGLang server, started here or joined by its address.

Every completion is a chain of requests, of which each is sampled under one version: before new weights are loaded all
requests are aborted and their last words awaited, which is a fence; afterwards each goes on from prompt and answer so
far. What the server caches of prefixes is keyed by version. With `kv = "recompute"` a request that goes on asks under
the new version's key, so its cache is computed anew and every token is that of exactly one version; with "keep" it asks
under its old key and finds its old cache, mixed and flagged so. New requests ask under the new key either way.

The requests live on one event loop in a thread of its own; the actor's thread hands leases over and collects.
"""

import asyncio
import json
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.blocks import Block, allocator
from engine.config import Config, ConfigError
from engine.generators.base import Sampled, stop_ids
from engine.generators.client import Client, Meta, Reason, ServerError, check_served
from engine.generators.sampling import stream_key
from engine.generators.server import Server
from engine.process import ProcessDied
from engine.schema import Finish, Lease, LeaseKey
from engine.tokenizer import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
RETRY_S = 0.05  # an abort does not reach a request that the server has not yet read
CLOSE_S = 5.0
STREAM_INTERVAL = 16  # tokens a message, where no stop string has to be found


@dataclass(eq=False)
class Sequence:
    """One completion on its way."""

    sample: int
    key: str = ""  # of the server's prefix cache
    request_id: str = ""  # under which the server knows it now
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(eq=False)
class Request:
    """A lease under way."""

    lease: Lease
    limit: int  # of new tokens
    sequences: list[Sequence]
    prefixes: dict[str, asyncio.Event] = field(default_factory=dict)  # by key: once the prompt is cached
    kv_mixed: bool = False
    cancelled: bool = False

    def finished(self) -> Sampled | None:
        if any(sequence.finish is None for sequence in self.sequences):
            return None
        return Sampled(
            lease=self.lease,
            lengths=[len(sequence.token_ids) for sequence in self.sequences],
            finish=[sequence.finish for sequence in self.sequences if sequence.finish is not None],
            token_ids=np.concatenate([np.array(sequence.token_ids, np.int32) for sequence in self.sequences]),
            logprobs=np.concatenate([np.array(sequence.logprobs, np.float32) for sequence in self.sequences]),
            versions=np.concatenate([np.array(sequence.versions, np.int32) for sequence in self.sequences]),
            kv_mixed=self.kv_mixed,
        )


class SGLang:
    """The `Generator` protocol on a server. Whatever goes wrong with it ends the generator: see `poll`."""

    def __init__(
        self,
        config: Config,
        server: Server | None,
        *,
        stop_ids: list[int],
        text: Callable[[np.ndarray], str],
    ):
        """`server` has just been started; without one, the server at `generator.sglang.url` is joined. Waits until it
        answers. Raises `ProcessDied` or `ConfigError`."""
        self.version = -1
        self.manifest = None  # the server's model is not ours to see
        self.generated_tokens = 0
        self._config, self._server, self._stop_ids, self._text = config, server, stop_ids, text
        self._recompute = config.generator.kv == "recompute"
        self._name = secrets.token_hex(4)  # in keys and labels: a joined server may remember another job's
        self._numbers = count()
        self._requests: list[Request] = []
        self._flying: set[str] = set()  # requests that the server may compute
        self._finished: deque[Sampled] = deque()
        self._error: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._label = ""  # of the version, to the server
        self._block: Block | None = None  # what it shares with the server
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()
        try:
            self._call(self._begin(), config.deadlines.start_s, "start of the SGLang server")
        except BaseException:
            self.close()
            raise

    # ---- protocol ----

    @property
    def num_running(self) -> int:
        return sum(sequence.finish is None for request in list(self._requests) for sequence in request.sequences)

    @property
    def num_free_slots(self) -> int:
        return self._config.generator.slots - self.num_running

    def fileno(self) -> int:
        return self._wake_read

    def submit(self, lease: Lease) -> None:
        """Queues a lease. Raises `ConfigError` for a prompt that is empty or leaves no room in the context."""
        length, context = len(lease.prompt.token_ids), self._config.model.context
        if not 0 < length < context:
            raise ConfigError(
                f"domains: prompt {lease.prompt.index} of {lease.prompt.domain!r} has {length} tokens: must be at "
                f"least 1 and below model.context = {context}"
            )
        limit = min(lease.sampling.max_new_tokens, context - length)
        request = Request(lease, limit, [Sequence(sample) for sample in range(lease.num_samples)])
        self._requests.append(request)
        self._loop.call_soon_threadsafe(self._launch, request)

    def poll(self, timeout_s: float) -> list[Sampled]:
        """The leases that finished; waits for one up to `timeout_s` seconds. Raises what ended the server, or what it
        said, once anything went wrong: the caller ends, and whoever supervises it starts all anew."""
        del timeout_s  # `fileno` tells when there is something
        while True:
            try:
                os.read(self._wake_read, 1 << 16)
            except BlockingIOError:
                break
        if self._error is not None:
            raise self._error
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def memory(self, num_bytes: int, device: torch.device) -> Tensor:
        """uint8 [num_bytes] on `device`, shared with the server; the same at every call."""
        if self._block is None:
            self._block = allocator(device).allocate(num_bytes)
        return self._block.tensor

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Samples with `weights`, views of `memory`, from the next token on; running requests go on.

        Raises `ServerError`, after which nothing can be sampled: the server may hold a mixture.
        """
        assert self._block is not None, "nothing is staged"
        memory = self._block.tensor
        start = memory.data_ptr()
        tensors = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.data_ptr() - start)
            for name, tensor in weights.items()
        ]
        for name, _, _, offset in tensors:
            if not 0 <= offset <= len(memory):
                raise ValueError(f"weights of version {version}: {name} is not in the generator's memory")
        place = {"device": memory.device.type, "handle": self._block.handle.hex(), "num_bytes": len(memory)}
        order = json.dumps({**place, "tensors": tensors})
        timeout_s = self._config.deadlines.publish_s
        self._call(self._apply(version, order), timeout_s, f"loading version {version} into the SGLang server")

    def cancel(self, key: LeaseKey) -> None:
        self._loop.call_soon_threadsafe(self._forget, key)

    def close(self) -> None:
        if self._server is not None:
            self._loop.call_soon_threadsafe(self._loop.remove_reader, self._server.fd)
        asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._server is not None:
            self._server.close()
        if self._block is not None:
            self._block.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # ---- on the event loop ----

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float, phase: str) -> T:
        """Runs `work` on the loop and waits for it."""

        async def limited() -> T:
            try:
                async with asyncio.timeout(timeout_s):
                    return await work
            except TimeoutError as error:
                raise ServerError(f"{phase}: not done after {timeout_s:g} s") from error

        future = asyncio.run_coroutine_threadsafe(limited(), self._loop)
        try:
            return future.result()
        except ServerError as error:
            raise self._reason(error) from error

    async def _begin(self) -> None:
        self._open = asyncio.Event()  # closed while weights are loaded
        self._landed = asyncio.Event()  # nothing flies
        self._landed.set()
        spec = self._config.generator.sglang
        if self._server is not None:
            self._client = Client(self._server.url, self._server.api_key)
            self._loop.add_reader(self._server.fd, self._fail, ServerError("it ended"))
        else:
            key = open(spec.api_key_file).read().strip() if spec.api_key_file else ""
            self._client = Client(spec.url, key)
        info = await self._greeting()
        self._num_ranks = int(info["tp_size"])
        self._seeded = bool(info["enable_deterministic_inference"])
        check_served(info, self._config)

    async def _greeting(self) -> dict[str, Any]:
        """What the server says of itself, once it says anything."""
        while True:
            if self._error is not None:
                raise self._error
            try:
                return await self._client.info()
            except ServerError as error:
                if error.status in (401, 403):
                    raise ConfigError(f"generator.sglang.api_key_file: {error}") from error
                await asyncio.sleep(RETRY_S)  # it listens on no socket yet

    def _launch(self, request: Request) -> None:
        for sequence in request.sequences:
            self._spawn(self._complete(request, sequence))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _complete(self, request: Request, sequence: Sequence) -> None:
        """One completion from its first token to its last, over as many requests as versions. Of a group's samples the
        first to ask under a key has the prompt computed, and the others find it."""
        while sequence.finish is None and not request.cancelled:
            await self._open.wait()
            if self._recompute or not sequence.token_ids:
                sequence.key = self._label
            if (prefix := request.prefixes.get(sequence.key)) is not None and not prefix.is_set():
                await prefix.wait()
                continue  # the weights may be others now
            await self._fly(request, sequence, request.prefixes.setdefault(sequence.key, asyncio.Event()))
        if not request.cancelled and (sampled := request.finished()) is not None:
            self._requests.remove(request)
            self._finished.append(sampled)
            os.write(self._wake_write, b".")

    async def _fly(self, request: Request, sequence: Sequence, prefix: asyncio.Event) -> None:
        """One request to the server, to its end or until it is aborted; sets `prefix` with its first token."""
        version, label = self.version, self._label
        request.kv_mixed |= sequence.key != label
        sequence.request_id = f"{self._name}-{next(self._numbers)}"
        self._flying.add(sequence.request_id)
        self._landed.clear()
        before = len(sequence.token_ids)
        try:
            async for meta in self._client.generate(self._asked(request, sequence)):
                if request.cancelled:
                    if meta.finish_reason is None:  # the first abort came before the server had read the request
                        await self._client.abort(sequence.request_id)
                    break
                if meta.weight_version != label:
                    raise ServerError(f"tokens of weights {meta.weight_version!r} where {label!r} were loaded")
                reason = meta.finish_reason
                if reason is not None and reason.type == "abort" and self._open.is_set():
                    raise ServerError(f"the server ended a request by itself: {reason.message}")
                num = self._keep(sequence, meta, before, version)
                prefix.set()
                self._find_stop(request, sequence, num)
                if reason is not None:
                    self._end(request, sequence, reason)
                elif sequence.finish is not None:
                    await self._client.abort(sequence.request_id)
                    break
        finally:
            prefix.set()
            self._flying.discard(sequence.request_id)
            if not self._flying:
                self._landed.set()

    def _asked(self, request: Request, sequence: Sequence) -> dict[str, Any]:
        lease, sampling = request.lease, request.lease.sampling
        options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k if sampling.top_k > 0 else -1,
            "max_new_tokens": request.limit - len(sequence.token_ids),
            "stop": list(sampling.stop),
            "stop_token_ids": self._stop_ids,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "stream_interval": 1 if sampling.stop else STREAM_INTERVAL,
        }
        if self._seeded:  # the server draws by seed and position
            key = stream_key(lease.seed, lease.kind, lease.group_id, sequence.sample)
            options["sampling_seed"] = int(key) & 0x7FFFFFFF
        return {
            "rid": sequence.request_id,
            "input_ids": [*lease.prompt.token_ids.tolist(), *sequence.token_ids],
            "sampling_params": options,
            "return_logprob": True,
            "logprob_start_len": -1,
            "extra_key": sequence.key,
        }

    def _keep(self, sequence: Sequence, meta: Meta, before: int, version: int) -> int:
        """Appends the tokens of a piece, the last ones of its list, which holds older ones too at times; how many."""
        num = meta.completion_tokens - (len(sequence.token_ids) - before)
        fresh = meta.output_token_logprobs[len(meta.output_token_logprobs) - num :] if num else []
        if len(fresh) != num:
            raise ServerError(f"{num} tokens with {len(fresh)} log-probabilities")
        for logprob, token_id, _ in fresh:
            sequence.token_ids.append(token_id)
            sequence.logprobs.append(float("nan") if logprob is None else logprob)
            sequence.versions.append(version)
        self.generated_tokens += num
        return num

    def _end(self, request: Request, sequence: Sequence, reason: Reason) -> None:
        """Notes why a request ended; one that was aborted goes on."""
        if sequence.finish is None and reason.type == "stop":
            sequence.finish = "stop"
        elif sequence.finish is None and len(sequence.token_ids) >= request.limit:
            sequence.finish = "length"

    def _find_stop(self, request: Request, sequence: Sequence, num: int) -> None:
        """Ends the completion with the first of its newest `num` tokens that completes a stop string. The server looks
        for them too, but sees none that began in the request before."""
        stop = request.lease.sampling.stop
        longest = 4 * max(map(len, stop), default=0) + 4  # a character takes at most four tokens
        for end in range(len(sequence.token_ids) - num + 1, len(sequence.token_ids) + 1) if stop else ():
            text = self._text(np.array(sequence.token_ids[max(0, end - longest) : end], np.int32))
            if any(string in text for string in stop):
                for facts in (sequence.token_ids, sequence.logprobs, sequence.versions):
                    del facts[end:]
                sequence.finish = "stop"
                return

    async def _apply(self, version: int, order: str) -> None:
        self._open.clear()
        await self._land()
        label = f"{self._name}-{version}"
        await self._client.update(label, order, self._num_ranks)
        self.version, self._label = version, label
        self._open.set()

    async def _land(self) -> None:
        """Aborts all requests and waits for their last words."""
        while self._flying:
            await self._client.abort_all()
            try:
                await asyncio.wait_for(self._landed.wait(), RETRY_S)
            except TimeoutError:
                continue

    def _forget(self, key: LeaseKey) -> None:
        for request in [request for request in self._requests if request.lease.key == key]:
            request.cancelled = True
            self._requests.remove(request)
            for sequence in request.sequences:
                if sequence.request_id in self._flying:
                    self._spawn(self._client.abort(sequence.request_id))
            os.write(self._wake_write, b".")  # there is room for others

    # ---- the end ----

    async def _leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    def _fail(self, error: BaseException) -> None:
        """Keeps the first error for `poll`."""
        if self._server is not None:
            self._loop.remove_reader(self._server.fd)
        if self._error is None:
            self._error = self._reason(error)
            os.write(self._wake_write, b".")

    def _reason(self, error: BaseException) -> Exception:
        """The server's end, where that is behind `error`."""
        if self._server is not None and self._server.exited():
            return self._server.error()
        return ProcessDied(f"the SGLang server: {error}")


def from_files(config: Config, files: dict[str, bytes], tokenizer: "PreTrainedTokenizerBase") -> SGLang:
    """The SGLang generator of a job, from what `Welcome` carries."""
    server = None if config.generator.sglang.url else Server(config, files, threads=torch.get_num_threads())
    return SGLang(
        config,
        server,
        stop_ids=stop_ids(tokenizer, files),
        text=lambda token_ids: decode(tokenizer, token_ids),
    )
