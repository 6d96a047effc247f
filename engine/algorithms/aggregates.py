"""What each token counts in the loss.

Each function takes the completions that N tokens form, the number of trainable tokens of each completion (`lengths`,
int64 [S]) and the number of tokens and of completions in the whole update, on all ranks. It returns omega [N]: 0 for
masked tokens. The denominators count tokens that are masked for their age, so that masking one does not make the
others louder.
"""

from torch import Tensor

from engine.algorithms.segments import Segments
from engine.algorithms.slots import Count


def token_mean(completions: Segments, lengths: Tensor, num_tokens: int, num_sequences: int) -> Tensor:
    """omega = 1 / num_tokens: all tokens are equal, so long completions count more. DAPO, arXiv:2503.14476."""
    return completions.mask / num_tokens


def sequence_mean(completions: Segments, lengths: Tensor, num_tokens: int, num_sequences: int) -> Tensor:
    """omega = 1 / (length * num_sequences): all completions are equal. GRPO, arXiv:2402.03300."""
    return completions.mask / (completions.spread(lengths.clamp(min=1)) * num_sequences)


def sequence_sum(completions: Segments, lengths: Tensor, num_tokens: int, num_sequences: int) -> Tensor:
    """omega = 1 / num_sequences: a completion's loss is that of the whole answer, the sum over its tokens."""
    return completions.mask / num_sequences


def constant(completions: Segments, lengths: Tensor, num_tokens: int, num_sequences: int, *, length: Count) -> Tensor:
    """omega = 1 / (length * num_sequences) with a fixed `length`, in tokens. Dr. GRPO, arXiv:2503.20783."""
    return completions.mask / (length * num_sequences)


AGGREGATES = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": constant,
}
