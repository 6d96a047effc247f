"""What the types of a configuration cannot say: a row for each field, and what its domains must not do."""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

OF_GROUPS = ("group_mean", "group_norm", "leave_one_out")  # advantages against the others of the group


class Rule(NamedTuple):
    """What the type of `field` cannot say of it."""

    field: str
    holds: Callable[[Any], object]
    allowed: str  # said where it does not hold; {0} is the configuration


TRUNCATED = "training needs top_p = 1 and top_k = 0 (what is left has no usable log-probabilities); [evaluation] may"
RULES = (
    Rule("generator.top_p", lambda it: it.generator.top_p == 1.0, TRUNCATED),
    Rule("generator.top_k", lambda it: it.generator.top_k == 0, TRUNCATED),
    Rule(
        "model.path",
        lambda it: bool(it.model.path) != bool(it.model.init),
        "exactly one of model.path and [model.init] is needed; --model.init={{}} drops the file's",
    ),
    Rule(
        "generator.gpus",
        lambda it: it.generator.gpus == 1 or it.generator.engine == "sglang",
        "more than 1 needs generator.engine = 'sglang'",
    ),
    Rule(
        "weights.directory",
        lambda it: bool(it.weights.directory) == (it.weights.route == "disk"),
        "is needed where weights.route = 'disk', and only there",
    ),
    Rule(
        "weights.route",
        lambda it: it.weights.route != "collective" or it.placement.trusted,
        "neither NCCL nor gloo encrypts or asks for a key, so that needs placement.trusted = true",
    ),
    Rule(
        "deadlines.lease_s",
        lambda it: it.deadlines.lease_s >= 3 * it.deadlines.heartbeat_s,
        "must be at least three times deadlines.heartbeat_s = {0.deadlines.heartbeat_s}, or generators that live count "
        "as silent",
    ),
    Rule("domains", lambda it: it.domains, "at least one [[domains]] table is needed"),
    Rule(
        "run.group_size",
        lambda it: it.run.group_size > 1 or it.algorithm.advantage.get("name") not in OF_GROUPS,
        "algorithm.advantage {0.algorithm.advantage[name]!r} of a group of one is always 0",
    ),
    Rule(
        "curriculum.pass_rate",
        lambda it: it.curriculum.pass_rate[0] <= it.curriculum.pass_rate[1],
        "the least of the rates comes first",
    ),
    Rule(
        "critic.path",
        lambda it: not (it.critic.shared and it.critic.path),
        "a shared critic has no model of its own",
    ),
    Rule(
        "learner.lr_end", lambda it: it.learner.lr_end <= it.learner.lr, "must be at most learner.lr = {0.learner.lr}"
    ),
    Rule("critic.lr_end", lambda it: it.critic.lr_end <= it.critic.lr, "must be at most critic.lr = {0.critic.lr}"),
    Rule(
        "learner.updates_per_step",
        lambda it: it.learner.updates_per_step <= it.run.groups_per_step,
        "must be at most run.groups_per_step = {0.run.groups_per_step}",
    ),
    Rule(
        "learner.tokens_per_micro_batch",
        lambda it: it.learner.tokens_per_micro_batch >= it.model.context,
        "must be at least the longest sequence, model.context = {0.model.context}",
    ),
    Rule(
        "generator.max_new_tokens",
        lambda it: it.generator.max_new_tokens < it.model.context,
        "leaves no room for a prompt in model.context = {0.model.context}",
    ),
)


def faults(config: Any) -> Iterator[str]:
    """A line for every mistake in a `engine.config.Config`."""
    for rule in RULES:
        if not rule.holds(config):
            yield f"{rule.field} = {attrgetter(rule.field)(config)!r}: {rule.allowed.format(config)}"
    names = [domain.name for domain in config.domains]
    for name in names:
        if names.count(name) > 1:
            yield f"domains: the name {name!r} stands twice"
    for number, domain in enumerate(config.domains):
        for name in ("path", "eval_path", "columns"):
            if (value := getattr(domain, name)) and domain.source != "file":
                yield f"domains.{number}.{name} = {value!r}: only where source = 'file'"
