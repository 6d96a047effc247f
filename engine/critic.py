"""The critic says of every token what reward the rest of the answer will bring.

It has a backbone of its own; or, under `critic.shared`, no more than a head that reads the policy's hidden states: then
it costs next to nothing, knows what the policy's features tell, and its errors move no weight of the policy.

Its value stands at the hidden state that predicts the token, before the token is known. It is trained by regression on
the targets that the advantage slot names, with an optimiser of its own, and may be trained alone for a while before the
policy moves: a critic that knows nothing, or a reward model that knows the ends of answers only, misleads a policy.
VC-PPO, arXiv:2503.01491; VAPO, arXiv:2504.05118.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed.checkpoint.state_dict as torch_state
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import fusion, parallel
from engine.config import Config, ConfigError
from engine.model import backbone, build, hidden_states
from engine.optimizer import NonFinite, adamw, descend, gradients, learning_rate, square_norm
from engine.packer import MicroBatch, Update
from engine.policy import Batch, blocks, recompute_activations

HEAD = "score.weight"  # the head's name in a checkpoint of Hugging Face's sequence classification, with one label

Targets = list[Tensor]  # by micro-batch of one update: [n], of its unmasked tokens
Hidden = Callable[[Batch], Tensor]  # the policy's hidden states [N, H] that predict a batch's targets
Advantages = Callable[..., tuple[Tensor, Tensor]]  # see engine.algorithms.advantages, by token


class Values(nn.Module):
    """Hidden states and head in one forward, as FSDP2 wants it: a batch's targets [N] -> their values [N]."""

    def __init__(self, head: Tensor):
        super().__init__()
        self.score = nn.Linear(head.shape[1], 1, bias=False, device=head.device, dtype=head.dtype)
        self.score.weight.data = head

    def forward(self, batch: Batch) -> Tensor:
        return self.score(self.hidden(batch).to(self.score.weight.dtype)).squeeze(1)

    def hidden(self, batch: Batch) -> Tensor:
        """[N, H]: those that predict the targets."""
        raise NotImplementedError


class Own(Values):
    """On a backbone of the critic's own."""

    def __init__(self, backbone: PreTrainedModel, head: Tensor):
        super().__init__(head)
        self.backbone = backbone

    def hidden(self, batch: Batch) -> Tensor:
        hidden = hidden_states(self.backbone, batch.token_ids, batch.position_ids, batch.layout)
        return hidden.index_select(0, batch.rows)


class Shared(Values):
    """On the policy's backbone, whose parameters are not the critic's."""

    def __init__(self, read: Hidden, head: Tensor):
        super().__init__(head)
        self._read = read

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        return self._read(batch)


class Critic:
    """Owns the values and their optimiser. With several ranks, each of them calls every method, in the same order."""

    def __init__(
        self, config: Config, policy: PreTrainedModel, advantages: Advantages, *, device: torch.device, read: Hidden
    ):
        """Begins as the model in `critic.path`, or as `policy`, not yet sharded, with values of 0; where it is shared,
        `read` gives it what `policy` has."""
        self._settings, self._advantages, self._device = config.critic, advantages, device
        self._max_bad = config.learner.max_bad_updates
        self._total_updates = config.run.steps * config.learner.updates_per_step
        self.updates = self.bad_in_a_row = 0
        if config.critic.shared:
            self._backbone, inner = backbone(policy), []
            self._values: Values = Shared(read, _head(policy))
        else:
            self._backbone, head = _from_path(config, policy) if config.critic.path else _from_policy(policy)
            self._values = Own(fusion.use(self._backbone, config.ops.backend, device), head).eval()
            inner = blocks(self._backbone)
            if config.learner.activation_checkpointing:
                recompute_activations(self._backbone)
        if parallel.num_ranks() > 1 or device.type == "cuda":
            precision = {"mixed_precision": config.learner.mixed_precision, "exact_root": True}
            parallel.shard(self._values, inner, device, **precision)
        self._optimizer = adamw(self._values, config.critic)

    def is_pretraining(self, step: int) -> bool:
        """Whether the take after `step` ones is the critic's alone."""
        return step < self._settings.pretrain_steps

    def appraise(self, updates: list[Update], *, alone: bool) -> tuple[list[Update], list[Targets], dict[str, float]]:
        """`updates` with advantages where they had rewards, this rank's part of them; the critic's targets; figures.

        `alone`: the targets are Monte-Carlo returns, whatever the method's own lambda is.
        """
        advantages = partial(self._advantages, lambda_critic=1.0) if alone else self._advantages
        sums = torch.zeros(5, device=self._device, dtype=torch.float64)
        appraised, targets = [], []
        for update in updates:
            mine = [self._appraise(micro, advantages, sums) for micro in update.micro_batches[parallel.rank()]]
            micro_batches = list(update.micro_batches)
            micro_batches[parallel.rank()] = [micro for micro, _ in mine]
            appraised.append(replace(update, micro_batches=micro_batches))
            targets.append([target for _, target in mine])
        return appraised, targets, _explained(*parallel.summed(sums).tolist())

    @torch.no_grad()
    def _appraise(self, micro: MicroBatch, advantages: Advantages, sums: Tensor) -> tuple[MicroBatch, Tensor]:
        batch = Batch.of(micro, self._device)
        values, tokens = self._values(batch), batch.tokens
        numbers = torch.arange(len(tokens.lengths) + 1, device=self._device)
        bounds = torch.searchsorted(tokens.sequence, numbers, out_int32=True)
        advantage, target = advantages(tokens.advantage.to(values.dtype), values, bounds, tokens.lengths)
        error = (target - values).double()
        figures = (torch.ones_like(error), target.double(), target.double().square(), error, error.square())
        sums += torch.stack([figure.sum() for figure in figures])
        column = np.zeros_like(micro.advantage)
        column[micro.mask != 0] = advantage.float().cpu().numpy()
        return replace(micro, advantage=column), target

    def train(self, updates: list[Update], targets: list[Targets]) -> dict[str, float]:
        """One optimiser step for each update on 1/2 (V - target)^2, mean over its tokens. Raises `NonFinite`."""
        outcomes = [self._update(*pair) for pair in zip(updates, targets, strict=True)]
        losses, norms = zip(*outcomes, strict=True)
        skipped = sum(not math.isfinite(loss + norm) for loss, norm in outcomes)
        return {
            "value_loss": sum(losses) / len(losses),
            "critic_grad_norm": max(norms),
            "critic_lr": self._optimizer.param_groups[0]["lr"],
            "critic_skipped_updates": skipped,
        }

    def _update(self, update: Update, targets: Targets) -> tuple[float, float]:
        total = torch.zeros((), device=self._device, dtype=torch.float64)
        for micro, target in zip(update.micro_batches[parallel.rank()], targets, strict=True):
            values = self._values(Batch.of(micro, self._device))
            loss = (values - target).square().sum() / (2 * max(1, update.num_tokens))
            loss.backward()
            total += loss.detach().double()
        shards = gradients(self._values)
        loss, square = parallel.summed(torch.stack([total, square_norm(shards)])).tolist()
        norm = math.sqrt(square)
        if math.isfinite(loss + norm):
            rate = learning_rate(self._settings, self.updates, self._total_updates)
            descend(self._optimizer, shards, norm, self._settings.clip_norm, rate)
            self.updates += 1
            self.bad_in_a_row = 0
        else:
            self._skip(loss, norm)
        return loss, norm

    def _skip(self, loss: float, norm: float) -> None:
        self._optimizer.zero_grad()
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self._max_bad:
            raise NonFinite(f"{self.bad_in_a_row} updates of the critic in a row: loss {loss}, gradient norm {norm}")

    # ---- state -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Model, optimiser and count of updates, shards where sharded."""
        model, optimizer = torch_state.get_state_dict(self._values, self._optimizer)
        return {"model": model, "optimizer": optimizer, "updates": torch.tensor(self.updates)}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave, possibly on another number of ranks."""
        torch_state.set_state_dict(
            self._values, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.updates = int(state["updates"])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, whole, by the name that sequence classification of Hugging Face has for it. Collective."""
        prefix = self._backbone.base_model_prefix
        for name, tensor in self._backbone.state_dict(prefix=f"{prefix}.").items():
            yield name, parallel.whole(tensor).detach()
        yield HEAD, parallel.whole(self._values.score.weight).detach()

    def export(self, directory: Path) -> None:
        """Writes a directory that `critic.path` may name. Collective."""
        weights = parallel.of_lead_alone(self.weights())
        if parallel.rank() == 0:
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
            config = self._backbone.config.to_dict() | {"id2label": {0: "value"}, "label2id": {"value": 0}}
            (directory / "config.json").write_text(json.dumps(config, default=str, indent=2))
        parallel.barrier()


def _explained(count: float, total: float, square: float, error: float, square_error: float) -> dict[str, float]:
    """The mean of the targets, and of their variance the share 1 - Var(target - V) / Var(target) that the values
    explained, left out where all targets are equal."""
    if count == 0:
        return {}
    variance, left = (sum2 / count - (sum1 / count) ** 2 for sum1, sum2 in ((total, square), (error, square_error)))
    explained = {} if variance <= 1e-12 else {"explained_variance": 1 - left / variance}
    return {"value_target": total / count, "value": (total - error) / count, **explained}


def _from_policy(policy: PreTrainedModel) -> tuple[PreTrainedModel, Tensor]:
    return copy.deepcopy(backbone(policy)), _head(policy)


def _head(policy: PreTrainedModel) -> Tensor:
    """Of values of 0."""
    width = policy.config.get_text_config().hidden_size
    return torch.zeros(1, width, dtype=next(policy.parameters()).dtype)


def _from_path(config: Config, policy: PreTrainedModel) -> tuple[PreTrainedModel, Tensor]:
    """The backbone in `critic.path`, and its head where it is a reward model's or a critic's; else values of 0."""
    source = msgspec.structs.replace(config.model, path=config.critic.path, init={})
    ids = {"eos_id": policy.config.eos_token_id, "pad_id": policy.config.pad_token_id}
    vocab = policy.config.get_text_config().vocab_size
    try:
        model = build(source, vocab_size=vocab, seed=0, empty=parallel.rank() > 0, **ids)
    except ConfigError as error:
        raise ConfigError(f"critic.path = {config.critic.path!r}: {error}") from error
    inner, head = _from_policy(model)
    for path in sorted(_directory(config.critic.path).glob("*.safetensors")) if parallel.rank() == 0 else ():
        with safe_open(path, "pt") as tensors:
            if HEAD in tensors.keys():  # noqa: SIM118  (no mapping)
                head = tensors.get_tensor(HEAD).to(head.dtype)
    if head.shape != (1, inner.config.get_text_config().hidden_size):
        raise ConfigError(f"critic.path = {config.critic.path!r}: its {HEAD} is of shape {tuple(head.shape)}")
    return inner, head


def _directory(path: str) -> Path:
    """Where the files of a model that was read from `path` lie: in it, or in the hub's cache."""
    here = Path(path)
    return here if here.is_dir() else Path(snapshot_download(path, local_files_only=True))
