"""The learner: forward, loss, backward and optimiser steps, on one rank or sharded over many."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint.state_dict as torch_state
from torch import Tensor
from transformers import PreTrainedModel

from engine import fusion, parallel
from engine.algorithms.method import Method, Tokens, means
from engine.config import Config, ConfigError
from engine.critic import Critic
from engine.head import head_of, is_matrix
from engine.model import lm_head
from engine.optimizer import NonFinite, adamw, descend, gradients, learning_rate, square_norm
from engine.packer import MicroBatch, Update, pack
from engine.policy import Batch, Policy, blocks, logprob, named_tensors, recompute_activations, with_advantage
from engine.schedule import Schedule
from engine.schema import Group


@dataclass(frozen=True)
class Outcome:
    """What came of one update, summed over micro-batches and ranks."""

    loss: float
    grad_norm: float  # before clipping
    sums: dict[str, float]  # of `Method.loss`

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Learner:
    """Owns the policy and its optimiser. With several ranks, each of them calls every method, in the same order.

    `version` counts publishes and `steps` takes; `updates` counts optimiser steps, `bad_updates` those skipped because
    loss or gradient was not finite.
    """

    def __init__(self, config: Config, model: PreTrainedModel, method: Method, *, device: str, directory: Path):
        """`model`, in the host's memory, is sharded to `device` in place; the reference policy is a copy of it as it is
        now. Ranks other than 0 may give an empty one (engine.model.build).

        The batches of skipped updates are kept in `directory`.
        """
        self._config = config.learner
        alone = config.critic.pretrain_steps if method.needs_critic else 0
        self._total_updates = (config.run.steps - alone) * config.learner.updates_per_step
        self._method = method
        self._device = torch.device(device)
        self._directory = directory
        self.version = self.steps = self.updates = self.bad_updates = self.bad_in_a_row = 0
        self.skipped: list[int] = []  # places of the last step's updates that were left out
        self._moved = False  # the present step has updated the policy already
        penalised = method.needs_reference or method.needs_entropy or method.imitation_coefficient != 0
        self._skips_idle = config.ops.health == "trained" and not penalised
        self.model = model
        fusion.use(model.eval(), config.ops.backend, self._device)  # eval: no dropout, as generators sample without it
        place = partial(self._place, config)
        values = partial(Critic, config, model, method.advantages, device=self._device, read=self._hidden)
        self.critic = values() if method.needs_critic else None
        self._reference = place(copy.deepcopy(model).requires_grad_(False)) if method.needs_reference else None
        if config.learner.activation_checkpointing:
            recompute_activations(model)
        self._policy = place(model)
        self._optimizer = adamw(model, config.learner)

    def _place(self, config: Config, model: PreTrainedModel) -> Policy:
        temperature = config.generator.temperature
        head = head_of(lm_head(model), config.ops.backend, self._device, temperature, self._method)
        if not is_matrix(lm_head(model)) and (Schedule(config).changes_temperature or config.generator.target_entropy):
            raise ConfigError("generator.temperature: may not change, as the model's head is more than a matrix")
        policy = Policy(model, head, temperature)
        if parallel.num_ranks() > 1 or self._device.type == "cuda":
            precision = {"mixed_precision": config.learner.mixed_precision, "exact_root": config.model.fp32_head}
            parallel.shard(policy, blocks(model), self._device, **precision)
        return policy

    def _hidden(self, batch: Batch) -> Tensor:
        return self._policy(batch, read=True)

    # ---- training ----------------------------------------------------------------------------------------------

    def step(self, updates: list[Update]) -> dict[str, float]:
        """Trains on one take and moves to the next version. Returns the step's metrics, equal on all ranks.

        The first `critic.pretrain_steps` steps train the critic alone. Raises `NonFinite` after
        `learner.max_bad_updates` skipped updates in a row.
        """
        self._moved = False
        figures: dict[str, float] = {}
        outcomes: list[Outcome] = []
        alone = self.critic is not None and self.critic.is_pretraining(self.steps)
        if self.critic is not None:
            updates, targets, figures = self.critic.appraise(updates, alone=alone)
            figures |= self.critic.train(updates, targets)
        if not alone:
            proximals = self._proximals(updates)
            outcomes = [self._update(update, old) for update, old in zip(updates, proximals, strict=True)]
        self.skipped = [place for place, outcome in enumerate(outcomes) if not outcome.is_finite]
        self.version += 1
        self.steps += 1
        tokens = {
            "num_tokens": sum(update.num_tokens for update in updates),
            "num_stale_tokens": sum(update.num_stale_tokens for update in updates),
        }
        return summary(outcomes) | figures | tokens | {"lr": self._optimizer.param_groups[0]["lr"]}

    def _proximals(self, updates: list[Update]) -> list[list[Tensor | None]]:
        """The log-probabilities at the start of the step, by update and micro-batch; None where nothing needs them or
        the policy has not moved yet, so that its own ones are the same."""
        moved = [self._method.needs_proximal and number > 0 for number in range(len(updates))]
        return [
            [logprob(self._policy, self._batch(micro)) if needed else None for micro in self._mine(update)]
            for update, needed in zip(updates, moved, strict=True)
        ]

    def _update(self, update: Update, proximals: list[Tensor | None]) -> "Outcome":
        """One optimiser step, or none where loss or gradient is not finite on some rank."""
        names: list[str] = []
        total = torch.zeros((), device=self._device, dtype=torch.float64)
        for micro, proximal in zip(self._mine(update), proximals, strict=True):
            batch = self._batch(micro)
            tokens = self._tokens(batch, proximal, update)
            loss, sums = self._policy(batch, tokens, num_tokens=update.num_tokens, num_sequences=update.num_sequences)
            loss.backward()
            names = list(sums)
            total = total + torch.stack([loss.detach(), *sums.values()]).double()
        shards = gradients(self._policy)
        # The update's one wait for the device, and its one collective besides FSDP's.
        square, loss, *values = parallel.summed(torch.cat([square_norm(shards).view(1), total])).tolist()
        outcome = Outcome(loss, math.sqrt(square), dict(zip(names, values, strict=True)))
        if outcome.is_finite:
            self._apply(shards, outcome.grad_norm)
        else:
            self._skip(update, outcome)
        return outcome

    def _batch(self, micro: MicroBatch) -> Batch:
        return Batch.of(micro, self._device, with_advantage(micro) if self._skips_idle else None)

    def _tokens(self, batch: Batch, proximal: Tensor | None, update: Update) -> Tokens:
        """The batch's, with what the learner knows of the other policies."""
        reference = None if self._reference is None else logprob(self._reference, batch)
        return replace(
            batch.tokens,
            proximal=proximal,
            reference=reference,
            staleness=self.version - batch.version,
            moved=self._moved,
            solved=batch.solved[batch.tokens.sequence] / max(1, update.num_solved_tokens),
        )

    def _apply(self, shards: list[Tensor], norm: float) -> None:
        rate = learning_rate(self._config, self.updates, self._total_updates)
        descend(self._optimizer, shards, norm, self._config.clip_norm, rate)
        self.updates += 1
        self.bad_in_a_row = 0
        self._moved = True

    def _skip(self, update: Update, outcome: "Outcome") -> None:
        """Leaves parameters and optimiser as they are and keeps this rank's part of the batch."""
        broken = [name for name, p in self.model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
        self._optimizer.zero_grad()
        self.bad_updates += 1
        self.bad_in_a_row += 1
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"bad_update_{self.bad_updates}_rank_{parallel.rank()}.pt"
        batches = [_tensors(micro) for micro in self._mine(update)]
        kept = {"version": self.version, "outcome": vars(outcome), "parameters": broken, "micro_batches": batches}
        torch.save(kept, path)
        if self.bad_in_a_row >= self._config.max_bad_updates:
            raise NonFinite(
                f"{self.bad_in_a_row} updates in a row were not finite (loss {outcome.loss}, gradient norm "
                f"{outcome.grad_norm}) at version {self.version}; the last batch is in {path}"
            )

    def _mine(self, update: Update) -> list[MicroBatch]:
        return update.micro_batches[parallel.rank()]

    def mismatch(self, groups: list[Group]) -> float:
        """The mean |log-probability difference| between the generator's record of `groups` and this policy, in nats
        a token: numerical noise where the groups were sampled with the weights of now."""
        update = pack(
            groups,
            [np.zeros(group.num_samples, np.float32) for group in groups],
            version=self.version,
            max_staleness=self.version,
            num_ranks=parallel.num_ranks(),
            budget=self._config.tokens_per_micro_batch,
            share_prefix=self._config.share_prefix,
            num_updates=1,
        )[0]
        total = torch.zeros(2, device=self._device, dtype=torch.float64)
        for micro in self._mine(update):
            batch = Batch.of(micro, self._device)
            difference = (logprob(self._policy, batch) - batch.tokens.behaviour).abs()
            total += torch.stack([difference.double().sum(), batch.tokens.mask.double().sum()])
        difference, tokens = parallel.summed(total).tolist()
        return difference / tokens

    def peak_memory(self) -> dict[str, float]:
        """The most of this rank's GPU that tensors held at once since the last call; nothing without a GPU."""
        if self._device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return {"gpu_memory_gb": peak / 1e9}

    # ---- state -------------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model, whole, by its Hugging Face name, a tied one once. On one rank these are the live
        tensors: copy them before the next step."""
        for name, tensor in named_tensors(self.model):
            yield name, parallel.whole(tensor)

    def state(self) -> dict[str, Any]:
        """Model, optimiser, reference and critic, shards where sharded; names do not depend on the number of ranks."""
        model, optimizer = torch_state.get_state_dict(self.model, self._optimizer)
        reference = {} if self._reference is None else torch_state.get_model_state_dict(self._reference.model)
        critic = {} if self.critic is None else self.critic.state()
        return {"model": model, "optimizer": optimizer, "reference": reference, "critic": critic}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave, possibly on another number of ranks."""
        torch_state.set_state_dict(
            self.model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self._reference is not None:
            torch_state.set_model_state_dict(self._reference.model, state["reference"])
        if self.critic is not None:
            self.critic.load(state["critic"])


def summary(outcomes: list[Outcome]) -> dict[str, float]:
    """One step's metrics from its updates; those that were skipped only count as such, unless all were.

    Where the policy had none, because the critic trains alone, only that none was skipped.
    """
    if not outcomes:
        return {"skipped_updates": 0}
    finite = [outcome for outcome in outcomes if outcome.is_finite]
    shown = finite or outcomes
    sums = {name: sum(outcome.sums[name] for outcome in shown) for name in shown[0].sums}
    return means(sums) | {
        "loss": sum(outcome.loss for outcome in shown) / len(shown),
        "grad_norm": max(outcome.grad_norm for outcome in shown),
        "skipped_updates": len(outcomes) - len(finite),
    }


def _is_finite(gradient: Tensor) -> bool:
    return bool(parallel.shards(gradient).isfinite().all())


def _tensors(micro: MicroBatch) -> dict[str, Any]:
    """`micro` as `torch.load` reads it back without unpickling classes."""
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in vars(micro).items()}
