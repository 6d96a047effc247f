"""The configuration: one TOML file, frozen structs, every error one line that names the field.

A file may say `extends = "base.toml"` (relative to itself); tables merge key by key, lists and slots are replaced.
`--a.b=c` on the command line overrides after that; the value is read as TOML and, where that fails, as a string.
"""

import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec


class ConfigError(ValueError):
    """A user's mistake: one line that names the field, its value and what is allowed. Exit code 2."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base of every table: frozen, and an unknown key is an error."""


Slot = dict[str, Any]  # {name = "...", keyword arguments of the function}: checked against its signature at launch


class Run(Struct, kw_only=True):
    name: str  # names the run directory
    directory: str = ""  # a directory of your choice; must not exist. Empty: root/name-NUMBER
    root: str = "runs"
    seed: int = 0
    steps: int
    groups_per_step: int
    group_size: int
    max_staleness: int = 4  # in versions; 0 is the synchronous on-policy algorithm


class Tokenizer(Struct):
    """Only where `model.init` makes a new model: a tokenizer of single characters, or of the words in `words`."""

    alphabet: str = ""
    words: list[str] = []


class Model(Struct, kw_only=True):
    path: str = ""  # a directory in Hugging Face format, or a hub id; exactly one of path and init
    init: dict[str, Any] = {}  # a new model: model_type and the other fields of its transformers config
    tokenizer: Tokenizer = Tokenizer()
    dtype: Literal["float32", "float64"] = "float32"  # of the parameters that the optimiser sees
    context: int  # the longest sequence, prompt and answer together, in tokens
    trust_remote_code: bool = False


class WarmStart(Struct):
    """Supervised training on (prompt, answer) pairs before the reinforcement learning; cached by content."""

    steps: int = 0
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 20
    noise: float = 0.0  # share of demonstrations whose answer is another prompt's
    cache: str = "~/.cache/leeway"


class Domain(Struct, kw_only=True):
    name: str
    source: Literal["reasoning_gym", "file", "callable"]
    task: str = ""  # reasoning_gym: the data set's name; callable: import path "package.module:function"
    path: str = ""  # file: .jsonl or .parquet with `prompt`, `answer` and any further columns
    eval_path: str = ""  # file: held-out data; empty: the split is made by prompt hash
    options: dict[str, Any] = {}  # of the task or the callable
    question: str = ""  # reasoning_gym: words the task by the item's metadata, "{word}="; empty: by its own question
    template: str = "{prompt}"  # applied to text prompts, not to chat messages
    system: str = ""  # a system message, where the tokenizer has a chat template
    weight: float = 1.0
    reward: str = "exact"  # a name of rewards.TABLE or an import path
    reward_options: dict[str, Any] = {}
    eval_prompts: int = 0  # held-out prompts


class Generator(Struct, kw_only=True):
    engine: Literal["embedded"] = "embedded"
    local: int = 1  # generator children of this host, where no rank has the generator role
    slots: int = 64  # sequences decoded together
    ahead_groups: int = 2  # groups leased beyond what the slots hold, so that no slot waits for the network
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0  # training with less than 1 is refused
    top_k: int = 0  # training with more than 0 is refused
    stop: list[str] = []  # further stop strings; end-of-sequence always stops
    kv: Literal["recompute", "keep"] = "recompute"  # the KV cache of running requests when weights change
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 0  # of torch; 0: the host's cores divided among its processes
    reward_workers: int = 1


class Learner(Struct, kw_only=True):
    device: str = "auto"
    tokens_per_micro_batch: int
    share_prefix: bool = True  # compute each group's prompt once
    updates_per_step: int = 1  # optimiser updates a take
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    mixed_precision: bool = False  # bfloat16 compute on CUDA
    activation_checkpointing: bool = False
    max_bad_updates: int = 3  # non-finite updates in a row that end the job
    threads: int = 0
    parity_bound: float = 1e-3  # largest mean |log-probability difference| between generator and learner at start


class Algorithm(Struct):
    """A method is a composition of slots; see engine/algorithms."""

    advantage: Slot = msgspec.field(default_factory=lambda: {"name": "group_norm"})
    correction: Slot = msgspec.field(default_factory=lambda: {"name": "none"})
    loss: Slot = msgspec.field(default_factory=lambda: {"name": "ppo_clip"})
    aggregate: Slot = msgspec.field(default_factory=lambda: {"name": "token_mean"})
    penalties: list[Slot] = []
    kl: Slot = msgspec.field(default_factory=lambda: {"name": "k3", "coefficient": 0.0})
    entropy: float = 0.0
    shuffle_rewards: bool = False  # a control: scores change places within their group, so nothing is to be learned
    filter_uniform: bool = True  # groups whose rewards are all equal are not trained


class Weights(Struct):
    route: Literal["auto", "shm", "tcp"] = "auto"


class Checkpoint(Struct):
    every: int = 20  # steps
    keep: int = 2
    export: bool = True  # Hugging Face format at the end


class Evaluation(Struct):
    every: int = 0  # steps; 0: only before and after
    before_after: bool = True
    samples: int = 4  # k of avg@k
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Placement(Struct):
    learners: int = 0  # torchrun ranks that learn; 0: one rank: 1; more: all but one
    bind: str = "127.0.0.1"  # interface of the coordinator and of the weights server
    port: int = 0  # of the coordinator; 0: a free one


class Deadlines(Struct):
    """Seconds after which a wait becomes an error that names the process and the phase."""

    start_s: float = 180.0  # a process until its first message
    heartbeat_s: float = 2.0  # a generator speaks at least this often
    lease_s: float = 20.0  # a generator silent for so long is dead; its leases go to others
    group_s: float = 1800.0  # a lease held for so long is taken back
    take_s: float = 900.0  # the learner for its next groups
    publish_s: float = 60.0  # a generator until it applied a version, or it leaves routing
    evaluate_s: float = 1800.0
    reward_s: float = 10.0  # one completion's reward
    collective_s: float = 300.0
    stop_s: float = 8.0  # everything, when asked to stop


class Tracking(Struct):
    tensorboard: bool = True
    wandb_project: str = ""
    progress: bool = True


class Config(Struct, kw_only=True):
    run: Run
    model: Model
    warm_start: WarmStart = WarmStart()
    domains: list[Domain]
    generator: Generator
    learner: Learner
    algorithm: Algorithm = Algorithm()
    weights: Weights = Weights()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    placement: Placement = Placement()
    deadlines: Deadlines = Deadlines()
    tracking: Tracking = Tracking()


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The configuration in `path`, its bases below it and `overrides` ("--a.b=c" or "a.b=c") above.

    Raises `ConfigError` for a file that is missing or no TOML, an unknown key, a wrong type or a value out of range.
    """
    table = read(Path(path))
    for override in overrides or []:
        apply_override(table, override)
    return parse(table)


def load_text(text: str) -> Config:
    """The configuration in the text of one resolved file, as `to_toml` wrote it."""
    return parse(tomllib.loads(text))


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
    base = table.pop("extends", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"extends = {base!r}: must be the path of a TOML file")
    return table if base is None else merge(read(path.parent / base, (*seen, path)), table)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`; tables merge, but a slot (a table with `name`) is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict) and "name" not in value
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
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
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), table)) from error
    check(config)
    return config


def _explain(message: str, table: dict[str, Any]) -> str:
    """msgspec's "... - at `$.run.steps`" as "run.steps = 'x': ..."."""
    text, _, where = message.partition(" - at `$")
    keys = where.rstrip("`").lstrip(".").replace("[", ".").replace("]", "").split(".") if where else []
    value: Any = table
    for key in keys:
        inside = value[int(key)] if isinstance(value, list) and key.isdigit() else value
        value = inside.get(key) if isinstance(inside, dict) and key in inside else inside
    field = ".".join(keys)
    shown = f"{field} = {value!r}: " if keys and not isinstance(value, dict | list) else f"{field}: " if keys else ""
    return shown + text.replace("Object", field or "the file").replace("`", "'")


def check(config: Config) -> None:
    """What a type cannot say. Raises `ConfigError`."""
    positive = {
        "run.steps": config.run.steps,
        "run.groups_per_step": config.run.groups_per_step,
        "run.group_size": config.run.group_size,
        "model.context": config.model.context,
        "generator.slots": config.generator.slots,
        "generator.max_new_tokens": config.generator.max_new_tokens,
        "generator.temperature": config.generator.temperature,
        "learner.tokens_per_micro_batch": config.learner.tokens_per_micro_batch,
        "learner.updates_per_step": config.learner.updates_per_step,
        "learner.lr": config.learner.lr,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "evaluation.samples": config.evaluation.samples,
        **{f"deadlines.{name}": value for name, value in msgspec.structs.asdict(config.deadlines).items()},
    }
    for field, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{field} = {value}: must be greater than 0")
    if config.run.max_staleness < 0:
        raise ConfigError(f"run.max_staleness = {config.run.max_staleness}: must be 0 or greater")
    if config.generator.top_p != 1.0 or config.generator.top_k != 0:
        raise ConfigError(
            f"generator.top_p = {config.generator.top_p}, generator.top_k = {config.generator.top_k}: training needs "
            "top_p = 1 and top_k = 0 (truncated sampling has no usable log-probabilities); [evaluation] may truncate"
        )
    if bool(config.model.path) == bool(config.model.init):
        raise ConfigError(f"model.path = {config.model.path!r}: exactly one of model.path and [model.init] is needed")
    if not config.domains:
        raise ConfigError("domains: at least one [[domains]] table is needed")
    names = [domain.name for domain in config.domains]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"domains: the name {name!r} stands twice")
    for number, domain in enumerate(config.domains):
        if not domain.weight > 0:
            raise ConfigError(f"domains.{number}.weight = {domain.weight}: must be greater than 0")
    longest = config.model.context
    if config.learner.tokens_per_micro_batch < longest:
        raise ConfigError(
            f"learner.tokens_per_micro_batch = {config.learner.tokens_per_micro_batch}: must be at least the longest "
            f"sequence, model.context = {longest}"
        )
    if config.generator.max_new_tokens >= longest:
        raise ConfigError(
            f"generator.max_new_tokens = {config.generator.max_new_tokens}: leaves no room for a prompt in "
            f"model.context = {longest}"
        )


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `load` reads back to an equal value."""
    return msgspec.toml.encode(config).decode()
