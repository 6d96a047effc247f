"""Reductions over segments of a flat axis: the tokens of each completion, the completions of each group."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which of S segments each of N elements belongs to, and which elements count."""

    index: Tensor  # int64 [N], 0..S-1
    mask: Tensor  # float [N], 0 or 1
    num: int  # S

    def sum(self, values: Tensor) -> Tensor:
        """[N] -> [S]: the sum of the elements that count."""
        counted = values * self.mask
        return counted.new_zeros(self.num).index_add(0, self.index, counted)

    def mean(self, values: Tensor) -> Tensor:
        """[N] -> [S]: the mean of the elements that count; 0 where none does."""
        return self.sum(values) / self.sum(self.mask).clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[S] -> [N]: each element gets its segment's value."""
        return values[self.index]
