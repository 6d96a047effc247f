"""The configuration: one TOML file, frozen structs, every error one line that names the field.

A file may say `extends = "base.toml"`, or name several, each laid over the one before it (paths relative to the file);
tables merge key by key, lists and slots are replaced.
`--a.b=c` on the command line overrides after that; the value is read as TOML and, where that fails, as a string.
"""

# pyright: reportGeneralTypeIssues=false
# (msgspec hands `frozen` down to subclasses; pyright wants each to repeat it.)

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from engine.rules import faults
from rewards.options import Count, Misfit, Natural, Positive, Unsigned, convert


class ConfigError(ValueError):
    """A user's mistake: one line that names the field, its value and what is allowed. Exit code 2."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base of every table: frozen, and an unknown key is an error."""


Table = TypeVar("Table", bound=Struct)

# What a value may be, beside the types of rewards.options.
Share = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
Mass = Annotated[float, Meta(gt=0, le=1)]
Text = Annotated[str, Meta(min_length=1)]
Route = Literal["auto", "shm", "tcp", "disk", "collective", "cuda_ipc"]  # of weights; see engine.weights
Slot = dict[str, Any]  # {name = "...", keyword arguments of the function}: checked against its signature at launch


class Run(Struct, kw_only=True):
    name: str  # names the run directory
    directory: str = ""  # a directory of your choice; must not exist. Empty: root/name-NUMBER
    root: str = "runs"
    seed: Natural = 0
    steps: Count
    groups_per_step: Count
    group_size: Count
    max_staleness: Natural = 4  # in versions; 0 is the synchronous on-policy algorithm


class Tokenizer(Struct):
    """Only where `model.init` makes a new model: a tokenizer of single characters, or of the words in `words`."""

    alphabet: str = ""
    words: list[str] = []


class Model(Struct, kw_only=True):
    path: str = ""  # a directory in Hugging Face format, or a hub id; exactly one of path and init
    init: dict[str, Any] = {}  # a new model: model_type and the other fields of its transformers config
    tokenizer: Tokenizer = Tokenizer()
    dtype: Literal["float32", "float64"] = "float32"  # of the parameters that the optimiser sees
    fp32_head: bool = False  # the head in float32 even where generator or learner compute in bfloat16
    context: Count  # the longest sequence, prompt and answer together, in tokens
    chat_template: str = ""  # Jinja, or a file of it, instead of the tokenizer's own
    chat_template_kwargs: dict[str, Any] = {}  # its variables: { enable_thinking = false }


class WarmStart(Struct):
    """Supervised training on (prompt, answer) pairs before the reinforcement learning; cached by content."""

    steps: Natural = 0
    batch_size: Count = 64
    lr: Positive = 1e-3
    warmup_steps: Natural = 20
    noise: Share = 0.0  # share of demonstrations whose answer is another prompt's
    cache: str = "~/.cache/leeway"


class Domain(Struct, kw_only=True):
    name: Text
    source: Literal["reasoning_gym", "file", "callable"]
    task: str = ""  # reasoning_gym: the data set's name; callable: import path "package.module:function"
    path: str = ""  # file: .jsonl or .parquet with `prompt`, `answer` and any further columns
    eval_path: str = ""  # file: held-out data; empty: the split is made by prompt hash
    columns: dict[str, str] = {}  # file: our name of a column = its own: { answer = "reward_model.ground_truth" }
    options: dict[str, Any] = {}  # of the task or the callable; any task: level = 2 or [0, 4] of its curriculum
    question: str = ""  # reasoning_gym: words the task by the item's metadata, "{word}="; empty: by its own question
    template: str = "{prompt}"  # what text prompts, not chat messages, are put into; or a file that holds it
    system: str = ""  # a system message, where the tokenizer has a chat template
    weight: Positive = 1.0
    reward: str = "exact"  # a name of rewards.TABLE or an import path
    reward_options: dict[str, Any] = {}
    eval_prompts: Natural = 0  # held-out prompts


class Curriculum(Struct):
    """Which prompts are drawn."""

    mixture: Slot = msgspec.field(default_factory=lambda: {"name": "static"})  # of the domains, by their weights
    columns: dict[str, tuple[float, float]] = {}  # rows of files with such a column: the least and the greatest value
    # Prompts whose newest pass rate lies outside are passed over. Where none of a domain is left the run says so and
    # goes on with the other domains; where none of any is left it ends.
    pass_rate: tuple[Share, Share] = (0.0, 1.0)
    rates: list[str] = []  # pass rates known at the start: `pass_rates.jsonl` of earlier runs, later over earlier ones


class SGLang(Struct, kw_only=True):
    """Where `generator.engine` is "sglang": a server in an environment of its own, started here or joined."""

    python: str = ".venv-sglang/bin/python"  # of the environment that `make sglang` makes
    options: dict[str, Any] = {}  # of SGLang's ServerArgs
    environment: dict[str, str] = {}  # variables for the server
    path: list[str] = []  # directories of modules before all others
    deterministic: bool = False  # SGLang's mode in which what is sampled hangs on weights, prompt and seed alone
    url: str = ""  # of a running server, which then belongs to this job alone
    api_key_file: str = ""  # holds the key of that server


class Generator(Struct, kw_only=True):
    engine: Literal["embedded", "sglang"] = "embedded"
    sglang: SGLang = SGLang()
    gpus: Count = 1  # of one generator: more are for a tensor-parallel SGLang server
    local: Natural = 1  # generator children of this host, where no rank has the generator role
    slots: Count = 64  # sequences decoded together
    ahead_groups: Natural = 2  # groups leased beyond what the slots hold, so that no slot waits for the network
    max_new_tokens: Count
    temperature: Positive = 1.0
    top_p: Mass = 1.0  # training with less than 1 is refused
    top_k: Natural = 0  # training with more than 0 is refused
    stop: list[Text] = []  # further stop strings; end-of-sequence always stops
    target_entropy: Unsigned = 0.0  # nats a token, which the temperature follows from step to step; 0: it does not
    # The KV cache of running requests when weights change. Kept, tokens hang on several versions and no one of them can
    # compute them again; bench/inflight.py found no gain that would be worth that (0.88 times as many tokens).
    kv: Literal["recompute", "keep"] = "recompute"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Natural = 0  # of torch; 0: the host's cores divided among its processes
    reward_workers: Count = 1  # processes for rewards that compute; those that wait share one more
    reward_memory_gb: Positive = 4.0  # of each of them; beyond it a reward raises MemoryError


class Optimizer(Struct, kw_only=True):
    """What [learner] and [critic] say of their optimiser."""

    lr: Positive
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Unsigned = 1e-8
    weight_decay: Unsigned = 0.0
    clip_norm: Positive = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_end: Unsigned = 0.0  # to which linear and cosine fall
    warmup_steps: Natural = 0  # updates


class Learner(Optimizer, kw_only=True):
    device: str = "auto"
    tokens_per_micro_batch: Count
    share_prefix: bool = True  # compute each group's prompt once
    updates_per_step: Count = 1  # optimiser updates a take
    mixed_precision: bool = False  # bfloat16 compute on CUDA, and of several learners
    activation_checkpointing: bool = False
    max_bad_updates: Count = 3  # non-finite updates in a row that end the job
    threads: Natural = 0
    # largest mean |log-probability difference| between generator and learner at start; 0: 1e-3, or 0.05 where one of
    # them computes in bfloat16
    parity_bound: Unsigned = 0.0


class Critic(Optimizer, kw_only=True):
    """The value model, where `algorithm.advantage` needs one."""

    path: str = ""  # a reward model or an exported critic in Hugging Face format; empty: it begins as the policy
    shared: bool = False  # no backbone of its own: a head on the policy's hidden states, which it does not change
    pretrain_steps: Natural = 0  # takes at the start that train the critic alone, on Monte-Carlo returns
    lr: Positive = 2e-6


class Algorithm(Struct):
    """A method is a composition of slots; see engine/algorithms."""

    advantage: Slot = msgspec.field(default_factory=lambda: {"name": "group_norm"})
    correction: Slot = msgspec.field(default_factory=lambda: {"name": "none"})
    loss: Slot = msgspec.field(default_factory=lambda: {"name": "ppo_clip"})
    aggregate: Slot = msgspec.field(default_factory=lambda: {"name": "token_mean"})
    penalties: list[Slot] = []
    kl: Slot = msgspec.field(default_factory=lambda: {"name": "k3", "coefficient": 0.0})
    entropy: Unsigned = 0.0
    imitation: Unsigned = 0.0  # weight of -log pi, mean over the tokens of solved completions
    overlong_filter: bool = False  # completions cut off at the token limit count in baselines but do not train
    shuffle_rewards: bool = False  # a control: scores change places within their group, so nothing is to be learned
    filter_uniform: bool = True  # groups whose rewards are all equal are not trained


class Ops(Struct):
    backend: Literal["fused", "reference"] = "fused"  # of layers, head and loss: compiled kernels, or plain torch
    health: Literal["all", "trained"] = "all"  # metrics of "trained": answers without an advantage are left out


class Weights(Struct):
    # "auto": shm on the learner's host, else tcp. "collective": broadcast by NCCL or gloo, on trusted networks alone.
    # "cuda_ipc": from GPU to GPU, where learners and generators are on one host and all on GPUs
    route: Route = "auto"
    directory: str = ""  # disk: seen by learner and generators under this path
    delta: bool = True  # only what changed travels, where weights travel as bfloat16 and little did


class Checkpoint(Struct):
    every: Count = 20  # steps
    keep: Count = 2
    export: bool = True  # Hugging Face format at the end


class Evaluation(Struct):
    every: Natural = 0  # steps; 0: only before and after
    before_after: bool = True
    samples: Count = 4  # k of avg@k
    temperature: Positive = 1.0
    top_p: Mass = 1.0
    top_k: Natural = 0


class Placement(Struct):
    learners: int = 0  # torchrun ranks that learn; 0: one rank: 1; more: all but one
    bind: str = "127.0.0.1"  # interface of the coordinator and of the weights server
    port: int = 0  # of the coordinator; 0: a free one
    trusted: bool = False  # the network is: generators need no key, and nothing is encrypted


class Deadlines(Struct):
    """Seconds after which a wait becomes an error that names the process and the phase."""

    start_s: Positive = 180.0  # a process until its first message
    prepare_s: Positive = 3600.0  # rank 0 until its model is loaded or warmed up; the other ranks wait
    heartbeat_s: Positive = 2.0  # a generator speaks at least this often
    lease_s: Positive = 60.0  # a generator silent for so long is dead; its leases go to others
    group_s: Positive = 1800.0  # a lease held for so long is taken back
    take_s: Positive = 3600.0  # the learner for its next groups
    publish_s: Positive = 60.0  # a generator until it applied a version, or it leaves routing
    broadcast_s: Positive = 10.0  # a broadcast of weights for each of its steps; what it does not bring comes by TCP
    evaluate_s: Positive = 3600.0
    reward_s: Positive = 10.0  # one completion's reward
    judge_s: Positive = 600.0  # one that waits for others, a judge on the network say, its turn there included
    collective_s: Positive = 300.0  # the learner ranks for each other, once each has its model
    stop_s: Positive = 8.0  # everything, when asked to stop


class Tracking(Struct):
    tensorboard: bool = True
    wandb_project: str = ""
    progress: bool = True


class Config(Struct, kw_only=True):
    run: Run
    model: Model
    warm_start: WarmStart = WarmStart()
    domains: list[Domain]
    curriculum: Curriculum = Curriculum()
    generator: Generator
    learner: Learner
    critic: Critic = Critic()
    algorithm: Algorithm = Algorithm()
    ops: Ops = Ops()
    weights: Weights = Weights()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    placement: Placement = Placement()
    deadlines: Deadlines = Deadlines()
    tracking: Tracking = Tracking()
    schedule: list[dict[str, Any]] = []  # changes in the middle of the run: see engine.schedule
    stages: list[dict[str, Any]] = []  # one run after the other: see engine.stages


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The configuration in `path`, its bases below it and `overrides` ("--a.b=c" or "a.b=c") above.

    Raises `ConfigError` for a file that is missing or no TOML, an unknown key, a wrong type or a value out of range.
    """
    table = read(Path(path))
    for override in overrides or []:
        apply_override(table, override)
    return parse(table)


def load_text(text: str, overrides: list[str] | None = None) -> Config:
    """The configuration in the text of one resolved file, as `to_toml` wrote it, and `overrides` above."""
    table = tomllib.loads(text)
    for override in overrides or []:
        apply_override(table, override)
    return parse(table)


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The TOML table in `path` merged over those that it extends."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"extends: {path} extends itself")
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is no TOML: {error}") from error
    bases = table.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"extends = {bases!r}: must be the path of a TOML file, or a list of them")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read(path.parent / base, (*seen, path)))
    return merge(merged, table)


def merge(base: dict[str, Any], over: dict[str, Any], inside: str = "") -> dict[str, Any]:
    """`over` laid on `base`; tables merge, but a slot (a table with `name` inside [algorithm]) is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        tables = isinstance(old, dict) and isinstance(value, dict)
        slot = inside == "algorithm" and tables and "name" in value
        merged[key] = merge(old, value, key) if tables and not slot else value  # type: ignore[arg-type]
    return merged


def apply_override(table: dict[str, Any], override: str) -> None:
    """Sets one dotted key of `table` in place. A number selects an element of a list: domains.0.weight=2."""
    dotted, equals, text = override.removeprefix("--").partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{override}: an override is --table.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = dotted.split(".")
    place: Any = table
    for parent in parents:
        place = _child(place, parent, dotted)
    if isinstance(place, list):
        place[_index(place, last, dotted)] = value
    else:
        place[last] = value


def _child(place: Any, key: str, dotted: str) -> Any:
    child = place[_index(place, key, dotted)] if isinstance(place, list) else place.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"--{dotted}: {key} is no table")
    return child


def _index(place: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(f"--{dotted}: {key} is no place in a list of {len(place)}")
    return int(key)


def parse(table: dict[str, Any]) -> Config:
    """The checked configuration that a TOML table holds."""
    try:
        config = convert(table, Config)
    except Misfit as error:
        raise ConfigError(str(error)) from error
    config = resolved(config)
    if fault := next(faults(config), ""):
        raise ConfigError(fault)
    return config


def resolved(config: Config) -> Config:
    """`config` with the text of each template whose file it names, and ~ in paths as what it stands for."""
    domains = [
        msgspec.structs.replace(
            _at_home(domain, "path", "eval_path"),
            template=_text(f"domains.{number}.template", domain.template, ("{prompt}",)),
        )
        for number, domain in enumerate(config.domains)
    ]
    chat = config.model.chat_template
    model = msgspec.structs.replace(
        _at_home(config.model, "path"), chat_template=chat and _text("model.chat_template", chat, ("{{", "{%"))
    )
    sglang = _at_home(config.generator.sglang, "python", "path", "api_key_file")
    return msgspec.structs.replace(
        config,
        run=_at_home(config.run, "directory", "root"),
        model=model,
        warm_start=_at_home(config.warm_start, "cache"),
        domains=domains,
        curriculum=_at_home(config.curriculum, "rates"),
        generator=msgspec.structs.replace(config.generator, sglang=sglang),
        critic=_at_home(config.critic, "path"),
        weights=_at_home(config.weights, "directory"),
    )


def _at_home(table: Table, *fields: str) -> Table:
    """`table` with the ~ of these fields, paths or lists of them, expanded."""

    def expand(value: Any) -> Any:
        return list(map(expand, value)) if isinstance(value, list) else os.path.expanduser(value)

    return msgspec.structs.replace(table, **{field: expand(getattr(table, field)) for field in fields})


def _text(field: str, template: str, marks: tuple[str, ...]) -> str:
    """`template` where one of `marks` is in it, else the text of the file that it names, in which one must be."""
    if any(mark in template for mark in marks):
        return template
    allowed = f"must hold {' or '.join(marks)}, or name a file that does"
    try:
        text = Path(template).expanduser().read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field} = {template!r}: {allowed}: {getattr(error, 'strerror', error)}") from error
    if not any(mark in text for mark in marks):
        raise ConfigError(f"{field} = {template!r}: {allowed}")
    return text


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `load` reads back to an equal value."""
    return msgspec.toml.encode(config).decode()
