"""The models and the prompts of the benchmarks, as files that every engine reads."""

import json
import string
from pathlib import Path

import torch
from transformers import PreTrainedModel

from engine import tokenizer as tokenizers
from engine.config import Model, Tokenizer
from engine.model import build

ALPHABET = string.ascii_letters + string.digits + " .,:;+-*/=?!'\"()[]<>_#%&@$\n"
CONTEXT = 128  # tokens, prompt and completion together
ANSWER = 38  # tokens: the `max_new_tokens` of a benchmark

SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 16},  # 0.07 M parameters
    "small": {"hidden_size": 160, "num_hidden_layers": 4, "intermediate_size": 448, "head_dim": 40},  # 1.2 M
}


def make_model(directory: Path, size: str, seed: int = 0) -> None:
    """Writes a model of Qwen3's shape with weights drawn from `seed`, and its tokenizer of characters, to `directory`.

    At first it never ends a sequence: a completion has as many tokens as `max_new_tokens` allows, all of them
    characters. Training undoes that after some steps, but the reward `bench.reward.share` punishes an early end, so
    that completions stay within one per cent of the full length. So every engine trains on nearly the same number of
    tokens, and hardly any work is wasted on padding or on slots that stand empty.
    """
    shape = {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    spec = Model(init={**shape, **SIZES[size]}, tokenizer=Tokenizer(ALPHABET), context=CONTEXT)
    tokenizer = tokenizers.load(spec)
    vocabulary = tokenizer.get_vocab()
    pad_id, eos_id = vocabulary[tokenizers.PAD], vocabulary[tokenizers.EOS]
    policy = build(spec, vocab_size=len(tokenizer), eos_id=eos_id, pad_id=pad_id, seed=seed)
    _silence(policy, [pad_id, eos_id])
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def _silence(policy: PreTrainedModel, token_ids: list[int]) -> None:
    """Makes the probability of `token_ids` vanish: their logits are some 20 below all others.

    All other embeddings share a first component that outweighs the rest, so the last hidden state's is positive too,
    about 6 after the norm; the head, tied to the embeddings, multiplies it with these tokens' own, a negative one.
    """
    embeddings = policy.get_parameter("model.embed_tokens.weight")
    embeddings[:, 0] = 1.0
    embeddings[token_ids, 0] = -3.0


def make_prompts(path: Path, number: int) -> None:
    """Writes `number` different prompts of 41 tokens each, for the reward `bench.reward.share`, as JSON lines.

    All are of the same length, so that an engine that pads prompts has nothing to pad.
    """
    answer = (string.digits * ANSWER)[:ANSWER]
    rows = [{"prompt": f"No. {index:06d}: write one long line of digits", "answer": answer} for index in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
