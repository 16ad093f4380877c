"""What a measurement ran on, to be kept beside the numbers."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timm.layers import use_fused_attn

from vitprune._version import __version__
from vitprune.common.devices import cpu_has_fast_bf16

_CPUINFO = Path("/proc/cpuinfo")


def describe_environment() -> dict[str, Any]:
    """Software and hardware, as JSON-serialisable values that may be made public.

    No host name, user or path is in it. Packages that are not installed are None.
    """
    return {
        "vitprune": __version__,
        "torch": str(torch.__version__),
        "torchvision": _version("torchvision"),
        "timm": _version("timm"),
        "accelerate": _version("accelerate"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cpu_fast_bf16": cpu_has_fast_bf16(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "fused_attention": use_fused_attn(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "gpus": _gpus(),
        "mps": torch.backends.mps.is_available(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The marketing name where the system gives it, else the architecture."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_mib": gpu.total_memory // 2**20, "capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in properties
    ]
