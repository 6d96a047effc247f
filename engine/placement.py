"""Which torchrun rank does what, on how many threads, and how the learners find each other."""
# pyright: reportPrivateImportUsage=false

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

import msgspec
import torch
import torch.distributed as dist

from engine.config import Config, ConfigError
from engine.ops.library import cuda_is_built
from engine.process import cores


class Seat(msgspec.Struct, frozen=True):
    """One rank's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    num_learners: int
    num_children: int  # generator children that this rank supervises
    device: str
    threads: int  # of torch, in this rank
    child_threads: int  # of torch, in each child
    child_gpus: list[str] = []  # for each child the GPU that it sees, as CUDA_VISIBLE_DEVICES names it; none without

    @property
    def role(self) -> Literal["learner", "generator"]:
        return "learner" if self.rank < self.num_learners else "generator"


def seat(config: Config, environ: Mapping[str, str] = os.environ) -> Seat:
    """This process's seat, from torchrun's environment variables; without them it is the only rank.

    The first `placement.learners` ranks learn, every other one supervises a generator. Where no rank is left for
    that, rank 0 supervises `generator.local` children. A host's cores are divided evenly among all that compute on it:
    its learners and its generators. A learner takes the GPU of its local rank; so does the child of a generator rank,
    and those of rank 0 take the GPUs behind the learners', or share them. Raises `ConfigError` where the numbers do not
    fit.
    """
    rank, world = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(environ.get("LOCAL_RANK", 0)), int(environ.get("LOCAL_WORLD_SIZE", 1))
    learners = config.placement.learners or max(1, world - 1)
    if not 0 < learners <= world:
        raise ConfigError(f"placement.learners = {learners}: must be between 1 and the number of ranks, {world}")
    lead_children = config.generator.local if learners == world else 0
    children = 1 if rank >= learners else lead_children if rank == 0 else 0
    beside_lead = rank == local_rank  # ranks are numbered host by host
    beside = min(max(0, learners - (rank - local_rank)), local_world)  # learners of this host
    share = max(1, cores() // (local_world + (lead_children if beside_lead else 0)))
    return Seat(
        rank=rank,
        world_size=world,
        local_rank=local_rank,
        num_learners=learners,
        num_children=children,
        device=_device(config.learner.device, local_rank, beside),
        threads=config.learner.threads or share,
        child_threads=config.generator.threads or share,
        child_gpus=_gpus(config, beside + (local_rank - beside) * config.generator.gpus, children, environ)
        if rank >= learners
        else _gpus(config, local_world, children, environ),
    )


def _device(wanted: str, local_rank: int, beside: int) -> str:
    """The device of a learner that is one of `beside` on its host: a GPU each."""
    if wanted.startswith("cuda:") and beside > 1:
        raise ConfigError(f"learner.device = {wanted!r}: one GPU for {beside} learner ranks; 'cuda' gives each its own")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{local_rank}" if wanted == "cuda" else wanted


def _gpus(config: Config, first: int, num: int, environ: Mapping[str, str]) -> list[str]:
    """`generator.gpus` GPUs for each of `num` children, from number `first` on and round again; none where the user
    names one."""
    if config.generator.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    width = config.generator.gpus
    if width > len(visible):
        raise ConfigError(f"generator.gpus = {width}: this host shows {len(visible)}")
    starts = [first + number * width for number in range(num)]
    return [",".join(visible[(start + i) % len(visible)] for i in range(width)) for start in starts]


def check_devices(config: Config, seat: Seat) -> None:
    """Raises `ConfigError` for a device that this host, `seat`'s, does not have."""
    devices = {"learner.device": seat.device}
    if seat.num_children and config.generator.device != "auto":
        devices["generator.device"] = config.generator.device
    for field, device in devices.items():
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"{field} = {device!r}: must be auto, cpu, cuda or cuda:NUMBER; {reason}") from error


def check_route(config: Config, seat: Seat, environ: Mapping[str, str] = os.environ) -> None:
    """Raises `ConfigError` where the job is no such one as `weights.route` is for."""
    if config.weights.route != "cuda_ipc":
        return
    field = "weights.route = 'cuda_ipc': goes from GPU to GPU of one host"
    for name, device in {"learner.device": seat.device, "generator.device": config.generator.device}.items():
        if device != "auto" and not device.startswith("cuda"):
            raise ConfigError(f"{field}, but {name} is {device!r}")
    if (here := int(environ.get("LOCAL_WORLD_SIZE", 1))) != seat.world_size:
        raise ConfigError(f"{field}, but {seat.world_size - here} of {seat.world_size} ranks are on others")
    if not cuda_is_built():
        raise ConfigError(f"{field} by our CUDA kernels, which `make install` builds where nvcc is")


def advertised(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """`address` as others reach it: a wildcard interface becomes the name of the first rank's host."""
    host = environ.get("MASTER_ADDR", socket.gethostname())
    return address.replace("//0.0.0.0:", f"//{host}:")


def rendezvous(seat: Seat, timeout_s: float) -> dist.Store | None:
    """The key-value store of the job's ranks, torchrun's own where it offers it; None with one rank."""
    if seat.world_size == 1:
        return None
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        seat.world_size,
        is_master=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and seat.rank == 0,
        timeout=timedelta(seconds=timeout_s),
    )


def join_learners(seat: Seat, store: dist.Store | None, timeout_s: float) -> None:
    """Makes the learners' process group, which no generator is part of; every collective in it has a deadline.

    A single learner on a CPU trains the plain module and has no group.
    """
    cuda = seat.device.startswith("cuda")
    if seat.num_learners == 1 and not cuda:
        return
    if cuda:
        torch.cuda.set_device(seat.device)  # where FSDP2 puts its shards
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.HashStore() if store is None else dist.PrefixStore("learners", store),
        rank=seat.rank,
        world_size=seat.num_learners,
        timeout=timedelta(seconds=timeout_s),
    )


def limit_collectives(timeout_s: float) -> None:
    """The deadline of every collective of the learners' group from now on."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
