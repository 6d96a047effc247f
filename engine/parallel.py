"""The learners' ranks as one: FSDP2 sharding, sums over ranks, and whole tensors from shards.

The learners' process group is torch.distributed's default group; no generator is in it. Without a group there is one
rank, whose module stays plain.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard(root: nn.Module, blocks: list[nn.Module], *, mixed_precision: bool) -> None:
    """Shards every block and then `root` (embeddings, last norm, head) over all ranks, in place.

    Gradients are summed over ranks, not averaged: the loss already divides by the global counts. In mixed precision
    the computation is in bfloat16, the parameters and the reduction of gradients in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(root.parameters()).device.type
    mesh = init_device_mesh(device, (num_ranks(),), mesh_dim_names=("learners",))
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed_precision else None,
        reduce_dtype=torch.float32 if mixed_precision else None,
        cast_forward_inputs=False,  # advantages and log-probabilities must stay in float32
    )
    for module in (*blocks, root):
        sharded = fully_shard(module, mesh=mesh, mp_policy=precision)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows neither averages nor scaled sums


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


def summed(vector: Tensor) -> Tensor:
    """`vector` summed over ranks, in place."""
    if num_ranks() > 1:
        dist.all_reduce(vector)
    return vector


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
