"""Memory of the same size on each rank of a group, which every rank can address."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from moequant import ops

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_words(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in the host's memory that a device's kernels can add to, so that reading them waits for nothing."""
    return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


class PeerMemory:
    """nbytes of zeros on each rank. Building it is collective.

    local: (nbytes,) uint8, this rank's. pointers: (W,) int64 on the device, where each rank's begins in this process's address space.

    On GPUs it comes from torch.distributed._symmetric_memory. On a CPU, where interpreted kernels are tested, each rank's is a file that
    all of them map.
    """

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        if device.type == "cuda":
            self._share_gpu_memory(group, nbytes, device)
        else:
            self._share_files(group, nbytes)
        self.local.zero_()

    def _share_gpu_memory(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.local = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        # kept, because the peers' mappings live as long as it does
        self._mapping = symmetric_memory.rendezvous(self.local, group)
        self.pointers = torch.tensor(list(self._mapping.buffer_ptrs), dtype=torch.int64, device=device)

    def _share_files(self, group: dist.ProcessGroup, nbytes: int) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        folder = [tempfile.mkdtemp(prefix="moequant-") if rank == 0 else ""]
        dist.broadcast_object_list(folder, group=group, group_src=0)
        # opening a file with shared=True makes it, of this size
        maps = [
            torch.from_file(f"{folder[0]}/{peer}", shared=True, size=nbytes, dtype=torch.uint8, device="cpu")
            for peer in range(ranks)
        ]
        dist.barrier(group)
        if rank == 0:
            shutil.rmtree(folder[0])
        self._mapping = maps
        self.local = maps[rank]
        self.pointers = torch.tensor([x.data_ptr() for x in maps], dtype=torch.int64, device="cpu")

    def close(self) -> None:
        """Lets go of the memory, which is freed when the last view of it is gone; other ranks keep what they map."""
        self.local = self.local.new_empty(0)
        self._mapping = None


def why_unreachable(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why the ranks of a group can't address each other's memory, or None if they can. Collective, with the same answer on all ranks."""
    host = f"{socket.gethostname()} {BOOT_ID.read_text().strip() if BOOT_ID.exists() else ''}"
    identity = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else str(os.getpid())
    everyone: list[tuple[str, str, str]] = [("", "", "")] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (host, identity, device.type), group=group)
    hosts, identities, kinds = ([entry[i] for entry in everyone] for i in range(3))
    if any(kind != "cuda" for kind in kinds) and not ops.uses_kernels(torch.empty(0, device="cpu")):
        return "it needs a GPU on every rank"
    if len(set(hosts)) > 1:
        return f"the ranks are on {len(set(hosts))} hosts, and it works inside one"
    if len(set(identities)) < len(identities):
        return "several ranks share one GPU, and it needs one for each"
    if device.type != "cuda":
        return None
    problem = _peer_access_problem(device, identities)
    problems: list[str | None] = [None] * len(everyone)
    dist.all_gather_object(problems, problem, group=group)
    return next((text for text in problems if text), None)


def _peer_access_problem(device: torch.device, identities: list[str]) -> str | None:
    """What keeps this rank from the others' GPUs, as far as it can see them."""
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs"
    for index in range(torch.cuda.device_count()):
        visible = str(torch.cuda.get_device_properties(index).uuid)
        if index != device.index and visible in identities and not torch.cuda.can_device_access_peer(device, index):
            return f"{torch.cuda.get_device_name(device)} {device.index} has no access to the memory of GPU {index}"
    return None
