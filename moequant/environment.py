"""What this machine is, and which of the package's ways it can go: ten lines to begin a bug report with."""

from __future__ import annotations

import os
import platform
from collections import Counter

import torch
import torch.distributed as dist
from torch.cuda import nccl

from moequant import ops


def environment() -> str:
    """This process and its machine: GPUs, torch, Triton, NCCL, which kernels and which transports it gets, and why not others.

    `python -m moequant` prints it. Needs no GPU, and asks no other rank.

    Returns:
        Lines of "name: what it is".
    """
    import moequant

    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("MOEQUANT_", "TRITON_"))]
    lines = {
        "moequant": f"{moequant.__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} ({build()})",
        "Triton": triton_version() or "none",
        "NCCL": nccl_version() or "none",
        "GPUs": gpus(),
        "kernels": kernels(),
        "transport local": "yes",
        "transport collective": collective(),
        "transport symmetric": symmetric(),
        "settings": ", ".join(settings) or "none",
    }
    return "\n".join(f"{name}: {what}" for name, what in lines.items())


def build() -> str:
    """What torch was built for.

    Returns:
        CUDA or ROCm and its version, or "no CUDA".
    """
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def triton_version() -> str | None:
    """Of the Triton that is imported, which need not be the one that is installed.

    Returns:
        Its version, or None without one.
    """
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def nccl_version() -> str | None:
    """Of torch's NCCL.

    Returns:
        Its version, or None where it can't be used.
    """
    if not torch.cuda.is_available() or not dist.is_available() or not dist.is_nccl_available():
        return None
    return ".".join(map(str, nccl.version()))


def gpus() -> str:
    """The GPUs that this process sees.

    Returns:
        How many of which kind, or "none".
    """
    found = Counter(
        f"{gpu.name} (compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory >> 30} GiB)"
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    )
    return ", ".join(f"{count} x {name}" for name, count in found.items()) or "none"


def kernels() -> str:
    """Which kernels operations run as, on a GPU if there is one.

    Returns:
        Them, and why not others.
    """
    if not torch.cuda.is_available():
        interpreted = ops.uses_kernels(torch.empty(0, device="cpu"))
        return "plain Triton, in its interpreter" if interpreted else "none, torch on the CPU: there is no GPU"
    if triton_version() is None:
        return "none: Triton is not installed, and on a GPU nothing runs without it"
    from moequant.kernels.library.triton_versions import why_no_gluon

    reason = why_no_gluon(torch.device("cuda", torch.cuda.current_device()))
    return "Hopper's in Gluon, and plain Triton" if reason is None else f"plain Triton; not Hopper's in Gluon: {reason}"


def collective() -> str:
    """Whether transport "collective" can be used.

    Returns:
        "yes" and over what, or "no" and why.
    """
    if not dist.is_available():
        return "no: this torch has no torch.distributed"
    return f"yes, over {'gloo' if nccl_version() is None else 'NCCL'}"


def symmetric() -> str:
    """Whether the GPUs that this process sees can be ranks of one group.

    Returns:
        "yes" and how many, or "no" and why.
    """
    from moequant.transport.peer_memory import peer_access_problem

    count = torch.cuda.device_count()
    if count < 2:
        return f"no: it needs a GPU on every rank, and this process sees {count}"
    devices = [torch.device("cuda", index) for index in range(count)]
    identities = [str(torch.cuda.get_device_properties(device).uuid) for device in devices]
    problems = (peer_access_problem(device, identities) for device in devices)
    problem = next((text for text in problems if text), None)
    return f"yes, among {count} GPUs" if problem is None else f"no: {problem}"
