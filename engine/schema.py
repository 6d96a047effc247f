"""What travels between the processes: messages as msgspec structs with arrays in them, see `engine.wire`.

`SCHEMA_VERSION` is checked at every hello and in every ledger, tap and checkpoint.
"""

from typing import Any, Literal

import msgspec
import numpy as np

from rewards.verdict import Verdict

SCHEMA_VERSION = 3

Kind = Literal["train", "eval", "probe"]
Finish = Literal["stop", "length"]
End = Literal["trained", "filtered", "failed", "expired"]
LeaseKey = tuple[Kind, int, int]  # kind, group_id, attempt


class Sampling(msgspec.Struct, frozen=True):
    """How completions are drawn. `top_p` below 1 or `top_k` above 0 are for evaluation only."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


class Prompt(msgspec.Struct, frozen=True):
    """One task: its tokens for the generator; its text, answer and fields for the reward."""

    domain: str
    index: int  # place in the domain's data
    token_ids: np.ndarray  # int32 [P]
    text: str
    answer: str
    fields: dict[str, Any] = {}


class Lease(msgspec.Struct, frozen=True):
    """A group handed to one generator: `num_samples` completions of one prompt. `version` is the lease's, not a
    token's: the newest applied version when it was granted. Random numbers are keyed by (seed, group_id, sample,
    position), so a second attempt at the same weights gives the same tokens."""

    kind: Kind
    group_id: int
    attempt: int
    version: int
    seed: int
    num_samples: int
    prompt: Prompt
    sampling: Sampling

    @property
    def key(self) -> LeaseKey:
        return self.kind, self.group_id, self.attempt


class Group(msgspec.Struct, frozen=True):
    """A finished lease. The completions lie flat one after the other; `lengths[i]` tokens belong to sample i.

    token_ids int32 [T]; logprobs float32 [T], log softmax(logits / temperature) of each sampled token under the
    weights that sampled it; versions int32 [T], that weight version; loss_mask uint8 [T], 0 for tokens that the
    policy did not choose (observations); T = sum(lengths). Where verdicts have segments, segment_ends[i][k] counts the
    tokens of sample i up to and with its segment k; the last segment ends with the completion.
    """

    kind: Kind
    group_id: int
    attempt: int
    incarnation: int
    generator: str
    domain: str
    lease_version: int
    temperature: float
    prompt_ids: np.ndarray  # int32 [P]
    lengths: list[int]
    finish: list[Finish]
    verdicts: list[Verdict]
    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    loss_mask: np.ndarray
    kv_mixed: bool = False  # the KV cache held entries of an older version while tokens were sampled
    segment_ends: list[list[int]] = []  # one list a sample, or none at all

    def check(self) -> None:
        """Raises `ValueError` where its parts do not fit each other."""
        columns = (self.token_ids, self.logprobs, self.versions, self.loss_mask)
        if {column.shape for column in columns} != {(sum(self.lengths),)} or min(self.lengths, default=0) < 0:
            raise ValueError(f"group {self.group_id}: {[column.size for column in columns]} tokens, not {self.lengths}")
        if not len(self.lengths) == len(self.finish) == len(self.verdicts):
            raise ValueError(f"group {self.group_id}: {len(self.lengths)} completions, {len(self.verdicts)} verdicts")

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def first_version(self) -> int:
        """The oldest version among the group's tokens; the lease's where it has none."""
        return int(self.versions.min()) if len(self.versions) else self.lease_version


# ---- generator -> coordinator ----------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A generator asks to join."""

    schema_version: int
    generator: str
    host: str
    pid: int


class Request(msgspec.Struct, tag=True, frozen=True):
    """How many samples the generator could start now; replaces its earlier request. Groups are granted while it is
    above 0, each lowering it by the group's size."""

    num_samples: int


class Applied(msgspec.Struct, tag=True, frozen=True):
    """The generator samples with `version` from its next decode step on."""

    incarnation: int
    version: int
    stage_s: float  # seconds spent copying and verifying, while sampling went on
    pause_s: float  # seconds in which no token was sampled
    num_bytes: int = 0  # that were copied: of the whole, or of a delta
    link_share: float = 0.0  # num_bytes / stage_s, of the most that this generator has seen


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Sent at a fixed interval: the leases held, and counters since the generator started."""

    held: list[LeaseKey]
    generated_tokens: int
    busy_s: float
    idle_s: float


class Result(msgspec.Struct, tag=True, frozen=True):
    """A finished group; sent again until acknowledged."""

    group: Group


class Failure(msgspec.Struct, tag=True, frozen=True):
    """The generator gives a lease back: it could not be sampled."""

    kind: Kind
    group_id: int
    attempt: int
    reason: str


class Bye(msgspec.Struct, tag=True, frozen=True):
    """The generator leaves; its leases go back to the pool."""


# ---- coordinator -> generator ----------------------------------------------------------------------------------


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """Everything a generator needs to start: the resolved configuration, the model's small files, the address of
    the weights."""

    schema_version: int
    incarnation: int
    config: str  # TOML
    files: dict[str, bytes]  # tokenizer and model configuration, by file name
    segment: str  # name of the shared-memory segment
    host: str  # where that segment is
    weights_port: int  # serves the same bytes over TCP to other hosts


class Leases(msgspec.Struct, tag=True, frozen=True):
    incarnation: int
    leases: list[Lease]


class Ack(msgspec.Struct, tag=True, frozen=True):
    """The group is on disk in the tap and the ledger, or was refused for good (`reason`); do not send it again."""

    kind: Kind
    group_id: int
    attempt: int
    reason: str = ""


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Leases that are over: they lapsed, or their result is known. Said again after every heartbeat that holds one."""

    leases: list[LeaseKey]


class Publish(msgspec.Struct, tag=True, frozen=True):
    """A new version lies ready; supersedes an earlier one not yet applied."""

    incarnation: int
    version: int


class Beat(msgspec.Struct, tag=True, frozen=True):
    """The answer to a heartbeat: the coordinator is alive."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """The job ended or refuses the generator."""

    reason: str
    refused: bool = False


# ---- learner -> coordinator ------------------------------------------------------------------------------------


class Take(msgspec.Struct, tag=True, frozen=True):
    """Rank 0 wants the next `num_groups` groups to train at `version`."""

    num_groups: int
    version: int


class Trained(msgspec.Struct, tag=True, frozen=True):
    """A take became `version`: `end` is `trained`, or `failed` where its updates were skipped (`reason`). Where only
    some were, `skipped` names the groups that failed by it."""

    version: int
    group_ids: list[int]
    end: End
    reason: str = ""
    entropy: float | None = None  # nats a token of what was sampled, where the learner measured it
    skipped: list[int] = []

    def end_of(self, group_id: int) -> End:
        return "failed" if group_id in self.skipped else self.end


class Published(msgspec.Struct, tag=True, frozen=True):
    """The weights of `version` lie complete in the segment; `digest` is their checksum's (engine.ops.buckets)."""

    version: int
    digest: str


class Save(msgspec.Struct, tag=True, frozen=True):
    """Write the coordinator's part of a checkpoint (cursor, frontier, buffered groups) to `path`."""

    path: str
    step: int


class Evaluate(msgspec.Struct, tag=True, frozen=True):
    """Sample held-out prompts. With `wait` the answer (`Evaluated` or `Probed`) comes when all are scored; without it
    the result comes in a later `State`."""

    name: str
    kind: Kind = "eval"
    wait: bool = False


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The learner is done: stop the generators, close the ledger."""

    reason: str


# ---- coordinator -> learner ------------------------------------------------------------------------------------


class Score(msgspec.Struct, frozen=True):
    """avg@k of one domain: mean over prompts of the share of solved completions, with its standard error."""

    accuracy: float
    stderr: float
    reward: float
    num_prompts: int
    num_completions: int
    num_invalid: int
    mean_length: float


class Evaluation(msgspec.Struct, frozen=True):
    name: str
    first_version: int
    last_version: int
    wall_s: float
    scores: dict[str, Score]  # by domain, and "all"


class State(msgspec.Struct, frozen=True):
    """The coordinator at one moment; `ends` counts groups by end, with `in_flight` and `drawn`."""

    ends: dict[str, int]
    buffered_groups: int
    leased_groups: int
    generators: dict[str, int]  # name -> applied version
    generated_tokens: int
    generator_busy_s: float
    generator_idle_s: float
    completed_evaluations: list[Evaluation] = []
    slowest: Applied | None = None  # of what the members applied last, what took longest to stage
    exhausted: list[str] = []  # domains of which the curriculum leaves out every prompt, until a result brings one back


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The coordinator's first message: generators may join at `address`. `incarnation` counts the starts of the run:
    0 for a fresh one, one more after each resume."""

    address: str
    incarnation: int


class Evaluated(msgspec.Struct, tag=True, frozen=True):
    evaluation: Evaluation


class Taken(msgspec.Struct, tag=True, frozen=True):
    """The groups of one take, oldest ticket first; `queue_s` is each one's wait between arrival and take. Where there
    are too few and never will be more, none, and `exhausted` says why."""

    groups: list[Group]
    queue_s: list[float]
    arrival_versions: list[int]  # the learner's version when each arrived: splits lag into in-flight and in-queue
    state: State
    exhausted: str = ""


class Probed(msgspec.Struct, tag=True, frozen=True):
    """Fresh completions for the parity check."""

    groups: list[Group]


class Done(msgspec.Struct, tag=True, frozen=True):
    """The request before this one was carried out."""

    state: State


class Stalled(msgspec.Struct, tag=True, frozen=True):
    """The request waits for longer than it should; said whenever the reason is news."""

    reason: str


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The request could not be carried out; the job cannot go on."""

    reason: str


# ---- in the tap alone ------------------------------------------------------------------------------------------


class Began(msgspec.Struct, tag=True, frozen=True):
    """The first record of an incarnation's tap: training went on from the checkpoint of `base_version`, whose `Saved`
    record has the digest `snapshot` (empty: from nothing), under `config` (TOML)."""

    incarnation: int
    base_version: int
    snapshot: str
    config: str


class Granted(msgspec.Struct, tag=True, frozen=True):
    """A training group was leased; its first lease is its draw."""

    group_id: int
    attempt: int
    domain: str
    prompt_index: int
    version: int
    generator: str


class Lapsed(msgspec.Struct, tag=True, frozen=True):
    """A training lease ended without a result; `given_up` where it was the group's last."""

    group_id: int
    attempt: int
    reason: str
    given_up: bool


class Took(msgspec.Struct, tag=True, frozen=True):
    """The learner's `Take` was answered with these groups."""

    version: int
    group_ids: list[int]


class Saved(msgspec.Struct, tag=True, frozen=True):
    """The coordinator's part of a checkpoint was written; `digest` is its xxh3-64."""

    step: int
    digest: str


# What the tap keeps, in its order: the coordinator's decisions and all that they follow from.
TapRecord = Began | Granted | Lapsed | Result | Ack | Take | Took | Trained | Published | Saved
FromGenerator = Hello | Request | Applied | Heartbeat | Result | Failure | Bye
ToGenerator = Welcome | Leases | Ack | Cancel | Beat | Publish | Stop
FromLearner = Take | Trained | Published | Save | Evaluate | Finished
ToLearner = Ready | Taken | Evaluated | Probed | Done | Stalled | Refused
