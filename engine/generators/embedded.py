"""A generator inside the process: continuous batching on the Hugging Face model's own forward.

Every poll is one forward over one new token of each running sequence and the whole prompts of the sequences that
start, then one token sampled for each. Running sequences fill slots 0 to n - 1 without gaps: when one ends, the last
moves into its slot, and what waits starts behind them at the next poll. A prompt is computed once for all samples of
its group; where not all find a slot at once, its keys and values stay in a spare slot for the rest.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine import fusion
from engine.attention import Layout
from engine.config import Config, ConfigError, Generator
from engine.generators.base import Sampled, stop_ids
from engine.generators.kv_cache import KVCache, Step
from engine.generators.sampling import draw, stream_key, uniform
from engine.model import from_description, hidden_states, lm_head, widen_head
from engine.policy import named_tensors
from engine.schedule import Schedule
from engine.schema import Finish, Lease, LeaseKey
from engine.tokenizer import decode
from engine.weights import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECOMPUTE_TOKENS = 16_384  # tokens of one forward when the cache is computed anew: bounds its memory

Completion = tuple[np.ndarray, np.ndarray, np.ndarray, Finish]  # token ids, log-probabilities, versions


@dataclass(eq=False)
class Request:
    """A lease under way."""

    lease: Lease
    num_started: int = 0
    completions: dict[int, Completion] = field(default_factory=dict)  # by sample
    kv_mixed: bool = False
    logits: Tensor | None = None  # [1, V] after the prompt, while the spare slot keeps its keys and values

    @property
    def num_waiting(self) -> int:
        return self.lease.num_samples - self.num_started

    def finished(self) -> Sampled:
        parts = [self.completions[sample] for sample in range(self.lease.num_samples)]
        token_ids, logprobs, versions, finish = zip(*parts, strict=True)
        return Sampled(
            lease=self.lease,
            lengths=[len(ids) for ids in token_ids],
            finish=list(finish),
            token_ids=np.concatenate(token_ids),
            logprobs=np.concatenate(logprobs),
            versions=np.concatenate(versions),
            kv_mixed=self.kv_mixed,
        )


class Slots:
    """What is known of each running sequence, one array a fact, so that a step costs no loop over sequences."""

    def __init__(self, num_slots: int, max_new_tokens: int):
        self.request: list[Any] = [None] * num_slots
        self.sample = np.zeros(num_slots, np.int64)
        self.kept = np.zeros(num_slots, np.int64)  # tokens in the cache: all but the newest
        self.count = np.zeros(num_slots, np.int64)  # tokens sampled
        self.limit = np.zeros(num_slots, np.int64)
        self.newest = np.zeros(num_slots, np.int64)  # the token sampled last
        self.key = np.zeros(num_slots, np.uint64)  # random stream
        self.temperature = np.ones(num_slots, np.float32)
        self.top_p = np.ones(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.token_ids = np.zeros((num_slots, max_new_tokens), np.int32)
        self.logprobs = np.zeros((num_slots, max_new_tokens), np.float32)
        self.versions = np.zeros((num_slots, max_new_tokens), np.int32)
        self._facts = list(vars(self).values())

    def move(self, source: int, target: int) -> None:
        for fact in self._facts:
            fact[target] = fact[source]


class Embedded:
    """The `Generator` protocol on a model in this process. One forward a poll; no threads, no clock."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: Generator,
        *,
        context: int,
        stop_ids: list[int],
        text: Callable[[np.ndarray], str],
    ):
        """`stop_ids` end a completion, and so does a stop string found in `text(token_ids)`."""
        self.version = -1
        self.generated_tokens = 0
        self._model, self._head = model.eval(), lm_head(model)
        self.manifest = Manifest.lay_out((name, tensor.shape, tensor.dtype) for name, tensor in named_tensors(model))
        self._num_slots, self._context, self._recompute = config.slots, context, config.kv == "recompute"
        self._stop_ids, self._text = np.array(sorted(set(stop_ids))), text
        *_, last_norm = model.base_model.parameters()  # of the dtype that the layers compute in, as the head may not be
        self._cache = KVCache(model.config, config.slots + 1, context, like=last_norm)
        self._spare = config.slots
        self._slots = Slots(config.slots, context)
        self._num_running = 0
        self._waiting: deque[Request] = deque()
        self._memory: Tensor | None = None

    # ---- protocol ----

    @property
    def num_running(self) -> int:
        return self._num_running + sum(request.num_waiting for request in self._waiting)

    @property
    def num_free_slots(self) -> int:
        return self._num_slots - self.num_running

    def submit(self, lease: Lease) -> None:
        """Queues a lease. Raises `ConfigError` for a prompt that is empty or leaves no room in the context."""
        length = len(lease.prompt.token_ids)
        if not 0 < length < self._context:
            raise ConfigError(
                f"domains: prompt {lease.prompt.index} of {lease.prompt.domain!r} has {length} tokens: must be at "
                f"least 1 and below model.context = {self._context}"
            )
        self._waiting.append(Request(lease))

    def cancel(self, key: LeaseKey) -> None:
        self._waiting = deque(request for request in self._waiting if request.lease.key != key)
        for slot in reversed(range(self._num_running)):  # from the end, since the last moves into a free one
            if self._slots.request[slot].lease.key == key:
                self._vacate(slot)

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass

    def memory(self, num_bytes: int, device: torch.device) -> Tensor:
        """uint8 [num_bytes] on `device`; where that is not the model's, and `load` copies, the same at every call."""
        if self._memory is None or device == self._cache.entries.device:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._memory

    @torch.inference_mode()
    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Samples with `weights` from the next token on, all or none. Where they are on the model's device they are the
        model's from now on, the caller's no more until the next load; else they are copied.

        Raises `ValueError` for a name that is unknown or missing, or a tensor of another shape.
        """
        own = self._model.state_dict(keep_vars=True)
        given = {id(own[name]) for name in weights if name in own}
        wrong = [name for name in weights if name not in own or own[name].shape != weights[name].shape]
        wrong += [name for name, tensor in own.items() if id(tensor) not in given]
        if wrong:
            raise ValueError(f"weights of version {version}: {wrong[0]} is not in both the model and the weights")
        for name, tensor in weights.items():
            replace(own[name], tensor)
        self.version = version
        for request in self._waiting:
            request.logits = None
        if self._recompute:
            self._recompute_cache()
        else:
            for request in self._slots.request[: self._num_running]:
                request.kv_mixed = True

    @torch.inference_mode()
    def poll(self, timeout_s: float) -> list[Sampled]:
        """One token for every sequence that runs or finds a slot; the leases that this finished."""
        del timeout_s  # every call advances
        num_decoding = self._num_running
        started = self._start()
        if not self._num_running:
            return []
        logits = self._forward(num_decoding, started)
        self._sample(logits)
        return self._end()

    # ---- one step ----

    def _start(self) -> list[tuple[Request, int, int]]:
        """Gives the free slots to what waits, oldest first: (request, first slot, slot after the last)."""
        started = []
        while self._waiting and self._num_running < self._num_slots:
            request, first = self._waiting[0], self._num_running
            num = min(request.num_waiting, self._num_slots - first)
            for slot in range(first, first + num):
                self._occupy(slot, request)
            self._num_running += num
            started.append((request, first, first + num))
            if not request.num_waiting:
                self._waiting.popleft()
        return started

    def _occupy(self, slot: int, request: Request) -> None:
        slots, lease, sample = self._slots, request.lease, request.num_started
        slots.request[slot], slots.sample[slot] = request, sample
        slots.kept[slot] = len(lease.prompt.token_ids)
        slots.count[slot] = 0
        slots.limit[slot] = min(lease.sampling.max_new_tokens, self._context - len(lease.prompt.token_ids))
        slots.key[slot] = stream_key(lease.seed, lease.kind, lease.group_id, sample)
        slots.temperature[slot] = lease.sampling.temperature
        slots.top_p[slot], slots.top_k[slot] = lease.sampling.top_p, lease.sampling.top_k
        request.num_started += 1

    def _forward(self, num_decoding: int, started: list[tuple[Request, int, int]]) -> Tensor:
        """Logits float32 [num_running, V] of every slot's next token."""
        slots = self._slots
        fresh = [(request, first) for request, first, _ in started if request.logits is None]
        kept = slots.kept[:num_decoding]
        token_ids, positions, homes = [slots.newest[:num_decoding]], [kept], [np.arange(num_decoding)]
        for request, first in fresh:
            prompt = request.lease.prompt.token_ids
            token_ids.append(prompt.astype(np.int64))
            positions.append(np.arange(len(prompt)))
            homes.append(np.full(len(prompt), first))
        ends = np.cumsum([len(part) for part in token_ids])
        packed = Layout(ends - num_decoding) if fresh else None
        if not ends[-1]:
            logits = self._cache.entries.new_empty(0, 0)
        else:
            hidden = self._run(token_ids, positions, homes, kept, packed)
            rows = np.concatenate([np.arange(num_decoding), ends[1:] - 1])
            logits = self._head(hidden if packed is None else hidden[self._tensor(rows)]).float()
        slots.kept[:num_decoding] += 1
        return logits if not started else self._fan_out(logits, num_decoding, started)

    def _run(
        self,
        token_ids: list[np.ndarray],
        positions: list[np.ndarray],
        homes: list[np.ndarray],
        kept: np.ndarray,
        packed: Layout | None,
    ) -> Tensor:
        """The model over rows whose keys and values go to places `positions` of slots `homes`."""
        where = np.concatenate(positions)
        step = Step(self._cache, kept, self._cache.places(np.concatenate(homes), where), packed)
        return hidden_states(self._model, self._tensor(np.concatenate(token_ids)), self._tensor(where), step)

    def _fan_out(self, logits: Tensor, num_decoding: int, started: list[tuple[Request, int, int]]) -> Tensor:
        """The rows of `logits`, a prompt's once for each of its samples; its keys and values go to their slots."""
        parts, fresh_row = [logits[:num_decoding]], num_decoding
        for request, first, last in started:
            length = len(request.lease.prompt.token_ids)
            if request.logits is None:
                row = logits[fresh_row : fresh_row + 1]
                fresh_row += 1
                self._cache.copy(first, first + 1, last, length)
                if request.num_waiting:
                    self._cache.copy(first, self._spare, self._spare + 1, length)
                    request.logits = row
            else:
                row = request.logits
                self._cache.copy(self._spare, first, last, length)
            parts.append(row.expand(last - first, -1))
        return torch.cat([part for part in parts if len(part)])

    def _sample(self, logits: Tensor) -> None:
        n, slots = self._num_running, self._slots
        numbers = uniform(slots.key[:n], slots.count[:n])
        tokens, logprobs = draw(
            logits,
            self._tensor(numbers),
            temperature=self._unless(slots.temperature[:n], 1.0),
            top_p=self._unless(slots.top_p[:n], 1.0),
            top_k=self._unless(slots.top_k[:n], 0),
        )
        slots.newest[:n] = tokens.cpu().numpy()
        row, column = np.arange(n), slots.count[:n]
        slots.token_ids[row, column] = slots.newest[:n]
        slots.logprobs[row, column] = logprobs.cpu().numpy()
        slots.versions[row, column] = self.version
        slots.count[:n] += 1
        self.generated_tokens += n

    def _end(self) -> list[Sampled]:
        """Records the sequences that ended, gives their slots away and returns the leases that are whole."""
        n, slots = self._num_running, self._slots
        stopped = np.isin(slots.newest[:n], self._stop_ids)
        for slot in range(n):
            if slots.request[slot].lease.sampling.stop:
                stopped[slot] |= self._found_stop(slot)
        finished = []
        for slot in np.flatnonzero(stopped | (slots.count[:n] >= slots.limit[:n]))[::-1].tolist():
            request, count = slots.request[slot], slots.count[slot]
            arrays = (facts[slot, :count].copy() for facts in (slots.token_ids, slots.logprobs, slots.versions))
            request.completions[int(slots.sample[slot])] = (*arrays, "stop" if stopped[slot] else "length")
            if len(request.completions) == request.lease.num_samples:
                finished.append(request.finished())
            self._vacate(slot)
        return finished

    def _found_stop(self, slot: int) -> bool:
        """Whether the text ends in a stop string or contains one. A character takes at most four tokens, so the
        string lies in the newest ones; had it been there earlier, the sequence would have ended."""
        stop = self._slots.request[slot].lease.sampling.stop
        last = self._slots.count[slot]
        text = self._text(self._slots.token_ids[slot, max(0, last - 4 * max(map(len, stop)) - 4) : last])
        return any(string in text for string in stop)

    def _vacate(self, slot: int) -> None:
        """Moves the last running sequence into `slot`."""
        self._num_running -= 1
        if slot != self._num_running:
            self._slots.move(self._num_running, slot)
            self._cache.copy(self._num_running, slot, slot + 1, int(self._slots.kept[slot]))
        self._slots.request[self._num_running] = None

    # ---- the cache under new weights ----

    def _recompute_cache(self) -> None:
        """Computes all that the cache keeps under the present weights, each group's prompt once."""
        groups: dict[Request, list[int]] = {}
        for slot in range(self._num_running):
            groups.setdefault(self._slots.request[slot], []).append(slot)
        chunk: dict[Request, list[int]] = {}
        size = 0
        for request, members in groups.items():
            size += len(request.lease.prompt.token_ids) + int(self._slots.count[members].sum())
            chunk[request] = members
            if size >= RECOMPUTE_TOKENS:
                self._recompute_chunk(chunk)
                chunk, size = {}, 0
        if chunk:
            self._recompute_chunk(chunk)

    def _recompute_chunk(self, groups: dict[Request, list[int]]) -> None:
        slots = self._slots
        token_ids, positions, homes, prefix = [], [], [], []
        for request, members in groups.items():
            prompt, root = request.lease.prompt.token_ids, len(prefix)
            sequences = [(members[0], 0, prompt, -1)]
            sequences += [(m, len(prompt), slots.token_ids[m, : slots.count[m] - 1], root) for m in members]
            for home, position, ids, parent in sequences:
                token_ids.append(ids.astype(np.int64))
                positions.append(position + np.arange(len(ids)))
                homes.append(np.full(len(ids), home))
                prefix.append(parent)
        ends = np.cumsum([0, *map(len, token_ids)])
        packed = Layout(ends, np.array(prefix))
        self._run(token_ids, positions, homes, np.empty(0, np.int64), packed)
        for request, members in groups.items():
            for member in members[1:]:
                self._cache.copy(members[0], member, member + 1, len(request.lease.prompt.token_ids))

    # ---- conversion ----

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._cache.entries.device)

    def _unless(self, array: np.ndarray, neutral: float) -> Tensor | None:
        return None if (array == neutral).all() else self._tensor(array)


def replace(parameter: Tensor, tensor: Tensor) -> None:
    """Makes `tensor` the parameter's memory where it is of its kind, else copies it there."""
    if (tensor.device, tensor.dtype) == (parameter.device, parameter.dtype):
        parameter.data = tensor
    else:
        parameter.copy_(tensor)


def from_files(config: Config, files: dict[str, bytes], tokenizer: "PreTrainedTokenizerBase") -> Embedded:
    """The embedded generator of a job, from what `Welcome` carries."""
    device = config.generator.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = from_description(files, config.generator.dtype, device)
    fusion.use(model, config.ops.backend, model.device)
    if config.model.fp32_head:
        widen_head(model)
    return Embedded(
        model,
        msgspec.structs.replace(config.generator, max_new_tokens=Schedule(config).longest_answer),
        context=config.model.context,
        stop_ids=stop_ids(tokenizer, files),
        text=lambda token_ids: decode(tokenizer, token_ids),
    )
