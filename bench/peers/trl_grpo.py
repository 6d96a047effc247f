"""TRL's GRPOTrainer on CPU in fp32: one run, reported as one line of JSON.

Runs in the peer's environment (see `environment`) and imports nothing of the engine. The algorithm is GRPO on policy:
group_size completions a prompt at temperature 1, advantages normalised by their group's deviation, one update a batch,
the mean over all tokens, no KL term. Of TRL's settings the fastest for a small model are used, tried one by one:
transformers' plain generation with a dynamic cache (a static one took 20% longer, continuous batching 5 to 8 times as
long) and PyTorch's own attention (the eager one took 20% more in all).
"""

# pyright: reportMissingImports=false
# The peer's packages are not installed where types are checked.

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.reward import TABLE

WARM_UP = 2  # steps that are not measured


class Record(TrainerCallback):
    """What this process trained in each step, and its clocks at each step's end."""

    def __init__(self, reward: str):
        self._reward = TABLE[reward]
        self.tokens: list[int] = []
        self.rewards: list[float] = []
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []  # of this process, all its threads, and its children

    def score(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        """The trainer's reward function; it is called once a step with all completions of this process."""
        rewards = [self._reward(*row) for row in zip(prompts, completions, answer, strict=True)]
        self.tokens.append(sum(map(len, completion_ids)))
        self.rewards.append(sum(rewards) / len(rewards))
        return rewards

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.wall_s.append(time.perf_counter())
        self.cpu_s.append(sum(os.times()[:4]))


def settings(arguments: argparse.Namespace, directory: str) -> GRPOConfig:
    """TRL's settings: the algorithm, then what makes it fast here, then what keeps it quiet."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return GRPOConfig(
        num_generations=arguments.group_size,
        max_completion_length=arguments.max_new_tokens,
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        loss_type="dapo",
        scale_rewards="group",
        max_steps=arguments.steps,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        disable_dropout=True,
        seed=arguments.seed,
        use_cpu=True,
        bf16=False,  # TRL's default is True
        per_device_train_batch_size=arguments.completions // processes,  # one micro-batch
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,  # TRL's default is True
        optim="adamw_torch_fused",
        dataloader_pin_memory=False,
        ddp_backend="gloo" if processes > 1 else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        output_dir=directory,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(arguments: argparse.Namespace) -> Record:
    """One run of the trainer."""
    record = Record(arguments.reward)
    rows = [json.loads(line) for line in arguments.prompts.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(arguments.model, padding_side="left"),
            reward_funcs=record.score,
            args=settings(arguments, directory),
            train_dataset=Dataset.from_list(rows),
            callbacks=[record],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return record


def report(arguments: argparse.Namespace, records: list[Record]) -> dict[str, Any]:
    """The figures of the steps after the first two, over all processes; rewards are of all steps."""
    wall_s = records[0].wall_s[-1] - records[0].wall_s[WARM_UP - 1]
    cpu_s = sum(record.cpu_s[-1] - record.cpu_s[WARM_UP - 1] for record in records)
    steps = arguments.steps - WARM_UP
    tokens = sum(sum(record.tokens[WARM_UP:]) for record in records)
    rewards = [sum(step) / len(records) for step in zip(*(record.rewards for record in records), strict=True)]
    quarter = max(1, len(rewards) // 4)
    return {
        "steps": steps,
        "trained_tokens": tokens,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "tokens_per_s": tokens / wall_s,
        "tokens_per_cpu_s": tokens / cpu_s,
        "completion_tokens": tokens / steps / arguments.completions,
        "reward_first": sum(rewards[:quarter]) / quarter,
        "reward_last": sum(rewards[-quarter:]) / quarter,
        "processes": len(records),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: str(module.__version__) for module in (trl, transformers, torch)},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model and tokenizer in Hugging Face format")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `prompt` and `answer`")
    parser.add_argument("--reward", choices=TABLE, default="exact")
    parser.add_argument("--steps", type=int, required=True, help=f"the first {WARM_UP} are not measured")
    parser.add_argument("--completions", type=int, default=128, help="a step, over all processes")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps = {arguments.steps}: must be greater than {WARM_UP}")
    return arguments


def main() -> None:
    arguments = parse()
    records = gather_object([train(arguments)])
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(report(arguments, records)))


if __name__ == "__main__":
    main()
