"""Memory of the same size on each rank of a group, which every rank can address."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from moequant import ops
from moequant.transport.rendezvous import exchange

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# where a rank is missing, as errors say it
PLACE = "the part of the dispatcher's constructor that shares memory"
# a fault word names a rank in 8 bits
MAX_RANKS = 256
# the driver's number of this property of a pair of GPUs
NATIVE_ATOMICS = 3


def host_words(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in the host's memory that a device's kernels can add to, so that reading them waits for nothing."""
    return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def view_of(words: torch.Tensor) -> memoryview:
    """The same numbers, as quick to read as Python's own."""
    return memoryview(cast(Any, words.numpy()))


class PeerMemory:
    """nbytes of zeros on each rank. Building it is collective, and waits `timeout` seconds for each rank to come.

    local: (nbytes,) uint8, this rank's. pointers: (W,) int64 on the device, where each rank's begins in this process's address space.

    On GPUs it comes from torch.distributed._symmetric_memory. On a CPU, where interpreted kernels are tested, each rank's is a file that
    all of them map.
    """

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device, timeout: float = 60.0) -> None:
        if device.type == "cuda":
            self._share_gpu_memory(group, nbytes, device, timeout)
        else:
            self._share_files(group, nbytes, timeout)
        self.local.zero_()

    def _share_gpu_memory(self, group: dist.ProcessGroup, nbytes: int, device: torch.device, timeout: float) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.local = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        # torch's own rendezvous would wait for a rank that is out of memory
        exchange(group, None, timeout, PLACE)
        # kept, because the peers' mappings live as long as it does
        self._mapping = symmetric_memory.rendezvous(self.local, group)
        self.pointers = torch.tensor(list(self._mapping.buffer_ptrs), dtype=torch.int64, device=device)

    def _share_files(self, group: dist.ProcessGroup, nbytes: int, timeout: float) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        folder = exchange(group, tempfile.mkdtemp(prefix="moequant-") if rank == 0 else "", timeout, PLACE)[0]
        # opening a file with shared=True makes it, of this size
        maps = [
            torch.from_file(f"{folder}/{peer}", shared=True, size=nbytes, dtype=torch.uint8, device="cpu") for peer in range(ranks)
        ]
        exchange(group, None, timeout, PLACE)
        if rank == 0:
            shutil.rmtree(folder)
        self._mapping = maps
        self.local = maps[rank]
        self.pointers = torch.tensor([x.data_ptr() for x in maps], dtype=torch.int64, device="cpu")

    def close(self) -> None:
        """Lets go of the memory, which is freed when the last view of it is gone; other ranks keep what they map."""
        self.local = self.local.new_empty(0)
        self._mapping = None


def why_unreachable(group: dist.ProcessGroup, device: torch.device, timeout: float = 60.0) -> str | None:
    """Why the ranks of a group can't address each other's memory, or None if they can. Collective, with the same answer on all ranks."""
    host = f"{socket.gethostname()} {BOOT_ID.read_text().strip() if BOOT_ID.exists() else ''}"
    identity = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else str(os.getpid())
    everyone = exchange(group, (host, identity, device.type), timeout, PLACE)
    hosts, identities, kinds = ([entry[i] for entry in everyone] for i in range(3))
    if any(kind != "cuda" for kind in kinds) and not ops.uses_kernels(torch.empty(0, device="cpu")):
        return "it needs a GPU on every rank"
    if len(everyone) > MAX_RANKS:
        return f"it serves up to {MAX_RANKS} ranks, and the group has {len(everyone)}"
    if len(set(hosts)) > 1:
        return f"the ranks are on {len(set(hosts))} hosts, and it works inside one"
    if len(set(identities)) < len(identities):
        return "several ranks share one GPU, and it needs one for each"
    if device.type != "cuda":
        return None
    problems = exchange(group, peer_access_problem(device, identities), timeout, PLACE)
    return next((text for text in problems if text), None)


def peer_access_problem(device: torch.device, identities: list[str]) -> str | None:
    """What keeps this rank from the others' GPUs, as far as it can see them. identities: of all ranks' GPUs."""
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs"
    assert device.index is not None
    for index in range(torch.cuda.device_count()):
        if index == device.index or str(torch.cuda.get_device_properties(index).uuid) not in identities:
            continue
        pair = f"{torch.cuda.get_device_name(device)} {device.index} and GPU {index}"
        if not torch.cuda.can_device_access_peer(device, index):
            return f"{pair} have no access to each other's memory"
        try:
            atomic = _link_has_atomics(device.index, index)
        except OSError as error:
            return f"the CUDA driver can't be asked what links the GPUs ({error})"
        if not atomic:
            return f"{pair} are linked by PCIe, and it needs NVLink: atomics that reach the other GPU's memory whole"
    return None


def _link_has_atomics(device: int, peer: int) -> bool:
    """Whether the link between two GPUs that this process sees does atomics itself. NVLink does; over PCIe, which gives access to memory
    too, they become a load and a store. Raises OSError if the driver can't be asked, which torch does not do."""
    driver = ctypes.CDLL("libcuda.so.1")
    handles = ctypes.c_int(), ctypes.c_int()
    answer = ctypes.c_int()
    error = driver.cuInit(0)
    for handle, index in zip(handles, (device, peer), strict=True):
        error = error or driver.cuDeviceGet(ctypes.byref(handle), index)
    error = error or driver.cuDeviceGetP2PAttribute(ctypes.byref(answer), NATIVE_ATOMICS, *handles)
    if error:
        raise OSError(f"error {error} of the CUDA driver")
    return bool(answer.value)
