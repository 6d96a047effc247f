"""What a job would do, told before it starts: roles, sizes, tickets, memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from engine.algorithms.method import compose
from engine.config import Algorithm, Config, Optimizer, Slot
from engine.head import HEADS
from engine.placement import Seat
from engine.policy import manifest_of, named_tensors
from engine.prompts import Prompts

SHOWN = 80  # characters of a prompt, at either end
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}


def overview(stages: list[Config]) -> str:
    """The stages of a job in one line."""
    steps = ", ".join(f"{Path(stage.run.directory).name} {stage.run.steps:,}" for stage in stages)
    return f"{len(stages)} stages, each from the weights of the one before; steps: {steps}"


def describe(config: Config, seat: Seat, policy: PreTrainedModel, prompts: Prompts) -> str:
    """The plan of a run, or of a stage, as lines of text."""
    run, parameters = config.run, sum(tensor.numel() for _, tensor in named_tensors(policy))
    generators = seat.world_size - seat.num_learners or config.generator.local
    completions = run.groups_per_step * run.group_size
    longest = completions * config.generator.max_new_tokens
    domains = ", ".join(f"{domain.name} {domain.weight:g}" for domain in config.domains)
    mixture = config.curriculum.mixture["name"]
    name = "/".join(Path(config.model.path).parts[-2:]) or "made here"  # of a later stage: the one before
    rows = {
        "run": run.name,
        "roles": f"{seat.num_learners} learner rank(s), {generators} generator(s) of {config.generator.slots} slots",
        "model": f"{name}: {parameters:,} parameters, {type(policy).__name__}, context {config.model.context}",
        "domains": f"{domains}, {mixture}; {len(prompts.held_out())} held-out prompts x {config.evaluation.samples}",
        "rewards": ", ".join(f"{domain.name} by {domain.reward}" for domain in config.domains),
        "drawn": _drawn(config),
        "answers": f"at most {config.generator.max_new_tokens:,} tokens, {_temperature(config)}",
        "method": _method(config.algorithm),
        "rate": _rate(config.learner),
        "a step": f"{run.groups_per_step} groups x {run.group_size} = {completions} completions, "
        f"at most {longest:,} answer tokens, {config.learner.updates_per_step} update(s)",
        "steps": f"{run.steps}, {run.steps * run.groups_per_step:,} groups",
        "tickets": f"(max_staleness {run.max_staleness} + 1) x {run.groups_per_step} = "
        f"{(run.max_staleness + 1) * run.groups_per_step} groups at once",
        "memory": ", ".join(f"{role} {size / 2**20:,.0f} MiB" for role, size in memory(config, seat, policy).items()),
    }
    for domain in config.domains:
        rows[f"a prompt of {domain.name}"] = _shortened(repr(prompts.prompt(domain.name, 0).text))
    if compose(config.algorithm).needs_critic:
        begins = "a head on the policy" if config.critic.shared else f"begins as {config.critic.path or 'the policy'}"
        rows["critic"] = f"{begins}, {config.critic.pretrain_steps} steps alone, rate {_rate(config.critic)}"
    for entry in config.schedule:
        rows[f"from step {entry['step']}"] = ", ".join(_changes(entry))
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def _shortened(text: str) -> str:
    """Beginning and end, where the instructions are."""
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}"


def _drawn(config: Config) -> str:
    """Which prompts come, and which groups are trained."""
    low, high = config.curriculum.pass_rate
    bounds = {"pass rate": (low, high)} if (low, high) != (0.0, 1.0) else {}
    wanted = [f"{name} {least:g} to {most:g}" for name, (least, most) in (bounds | config.curriculum.columns).items()]
    uniform = "uniform groups are filtered" if config.algorithm.filter_uniform else "uniform groups stay"
    return f"{', '.join(wanted) or 'all prompts'}; {uniform}"


def _temperature(config: Config) -> str:
    target = config.generator.target_entropy
    return f"temperature {config.generator.temperature:g}{f' and what keeps {target:g} nats a token' if target else ''}"


def _method(algorithm: Algorithm) -> str:
    """The slots that do something, and the terms of the loss beside them."""
    kl = [algorithm.kl] if algorithm.kl["coefficient"] != 0 else []
    correction = [algorithm.correction] if algorithm.correction["name"] != "none" else []
    slots = [algorithm.advantage, *algorithm.penalties, *correction, algorithm.loss, algorithm.aggregate, *kl]
    terms = [f"{name} {value:g}" for name in ("entropy", "imitation") if (value := getattr(algorithm, name))]
    controls = [name for name in ("overlong_filter", "shuffle_rewards") if getattr(algorithm, name)]
    return ", ".join([*map(_slot, slots), *terms, *controls])


def _slot(slot: Slot) -> str:
    values = ", ".join(f"{name} {value}" for name, value in slot.items() if name != "name")
    return f"{slot['name']} ({values})" if values else slot["name"]


def _rate(settings: Optimizer) -> str:
    warmup = f" after {settings.warmup_steps} updates of warm-up" if settings.warmup_steps else ""
    end = f" to {settings.lr_end:g}" if settings.schedule != "constant" else ""
    return f"{settings.lr:g}, {settings.schedule}{end}{warmup}"


def _changes(table: dict[str, Any], inside: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict) and "name" not in value:
            yield from _changes(value, f"{inside}{key}.")
        elif key != "step":
            yield f"{inside}{key} = {value}"


def memory(config: Config, seat: Seat, policy: PreTrainedModel) -> dict[str, float]:
    """Bytes of a learner rank, of a generator and of versions in shared memory: an estimate from above for the parts
    that grow with the configuration.

    Learner: (parameter + gradient + two moments, the same of a critic with a backbone of its own, and the reference's
    parameter where there is one) / ranks, the activations of one micro-batch (about 34 numbers a token, layer and
    hidden unit, or 2 with recomputation and one layer whole, arXiv:2205.05198) and what its head takes. Generator:
    parameters, their staged copy and the KV cache of all slots. Shared weights: two versions, in
    place of which the learners hold them where they are handed over between GPUs.
    """
    shape = policy.config.get_text_config()
    parameters = sum(tensor.numel() for _, tensor in named_tensors(policy))
    width, layers = shape.hidden_size, shape.num_hidden_layers
    tokens = config.learner.tokens_per_micro_batch
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or width // shape.num_attention_heads
    size, compute = BYTES[config.model.dtype], 2 if config.learner.mixed_precision else BYTES[config.model.dtype]
    activations = tokens * width * (layers * 2 + 34 if config.learner.activation_checkpointing else layers * 34)
    head = HEADS[config.ops.backend].memory(tokens, shape.vocab_size, width, seat.device)
    method = compose(config.algorithm)
    states = 4 + method.needs_reference + 4 * (method.needs_critic and not config.critic.shared)
    payload = sum(entry.num_bytes for entry in manifest_of(policy, config).entries)
    on_gpus = config.weights.route == "cuda_ipc"
    cache = 2 * layers * heads * head_dim * config.generator.slots * config.model.context
    return {
        "learner": (states * parameters * size + on_gpus * 2 * payload) / seat.num_learners
        + activations * compute
        + head,
        "generator": 2 * payload + cache * BYTES[config.generator.dtype],
        "shared weights": 0 if on_gpus else 2 * payload,
    }
