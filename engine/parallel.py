"""The learners' ranks as one: FSDP2 sharding, sums over ranks, and whole tensors from shards.

The learners' process group is torch.distributed's default group; no generator is in it. Without a group there is one
rank, whose module stays plain.
"""

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard(
    root: nn.Module, blocks: list[nn.Module], device: torch.device, *, mixed_precision: bool, exact_root: bool
) -> None:
    """Moves every block and then `root` (embeddings, last norm, head) to `device`, each sharded over all ranks as it
    comes there, in place. All ranks get rank 0's values: the others' parameters and buffers may be on the meta device.

    What has no gradient is gathered for the time of a forward only: no backward would give it back.
    Gradients are summed over ranks, not averaged: the loss already divides by the global counts. In mixed precision
    the computation is in bfloat16, the parameters and the reduction of gradients in float32. `exact_root` excepts
    from it what is outside the blocks: the head, and with it an embedding that may be tied to it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    parameter, frozen = next(root.parameters()), not any(p.requires_grad for p in root.parameters())
    values = {name: tensor.detach() for name, tensor in _tensors(root)}  # FSDP2 exchanges what the parameters hold
    mesh = init_device_mesh(device.type, (num_ranks(),), mesh_dim_names=("learners",))
    for module in (*blocks, root):
        narrow = mixed_precision and not (exact_root and module is root)
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if narrow else None,
            reduce_dtype=torch.float32 if narrow else None,
            output_dtype=parameter.dtype if exact_root and module in blocks[-1:] else None,
            cast_forward_inputs=module is not root,  # the root's: advantages and log-probabilities stay in float32
        )
        sharded = fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=frozen or None)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows neither averages nor scaled sums
    if any(tensor.is_meta for tensor in values.values()):
        root.to_empty(device=device)
    if num_ranks() > 1:
        for name, tensor in _tensors(root):
            _fill(tensor, values.pop(name), device)


def _tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(root.named_parameters(), root.named_buffers())


@torch.no_grad()
def _fill(tensor: Tensor, value: Tensor, device: torch.device) -> None:
    """Rank 0's `value`, whole on `device` for a moment, into the others' parts of `tensor`."""
    from torch.distributed.tensor import distribute_tensor

    value = value.to(device) if rank() == 0 else torch.empty_like(value, device=device)
    if _is_sharded(tensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements).to_local()  # type: ignore[attr-defined]
    else:
        dist.broadcast(value, 0)
    if rank() > 0:
        shards(tensor).copy_(value)


def barrier() -> None:
    """Returns when every rank has come here."""
    if num_ranks() > 1:
        dist.barrier()


def shards(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every rank (collective where it is sharded); a plain tensor itself, not copied."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def of_lead_alone(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The named tensors in rank 0's host memory, made one by one; the others take part in that and keep none, {}."""
    return {name: tensor.cpu() for name, tensor in tensors if rank() == 0}


def divides_rows(tensor: Tensor) -> bool:
    """Whether every rank holds ceil(rows / ranks) rows of the tensor in turn, the last ones fewer or none."""
    return _is_sharded(tensor) and [placement.is_shard(0) for placement in tensor.placements] == [True]  # type: ignore[attr-defined]


def send(tensor: Tensor, to_rank: int) -> None:
    """Gives a contiguous tensor to `to_rank`, which takes it by `receive`."""
    dist.send(tensor.view(-1).view(torch.uint8), to_rank)


def receive(tensor: Tensor, from_rank: int) -> Tensor:
    """`tensor` filled by the next `send` of `from_rank`."""
    dist.recv(tensor.view(-1).view(torch.uint8), from_rank)
    return tensor


def of_lead(numbers: list[int]) -> list[int]:
    """The numbers, of 64 bits, that rank 0 gave."""
    heard = torch.tensor(numbers)
    if num_ranks() > 1:
        dist.broadcast(heard, 0)
    return heard.tolist()


def gathered(numbers: list[int]) -> list[list[int]]:
    """What every rank gave, as many numbers of 64 bits each, by rank."""
    if num_ranks() == 1:
        return [numbers]
    mine = torch.tensor(numbers)
    found = [torch.empty_like(mine) for _ in range(num_ranks())]
    dist.all_gather(found, mine)
    return [each.tolist() for each in found]


def summed(vector: Tensor) -> Tensor:
    """`vector` summed over ranks, in place."""
    if num_ranks() > 1:
        dist.all_reduce(vector)
    return vector


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
