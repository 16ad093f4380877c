"""Where to run, in which precision, and what to say when its memory runs out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from vitprune.common.distributed import local_rank, world_size
from vitprune.common.formatting import first_line
from vitprune.errors import DeviceError, UsageError, VitpruneError

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
_OTHER_DEVICE = "use --device cpu, or --device auto for the best one there is"


def pick_device(name: str) -> torch.device:
    """The device of that name.

    Args:
        name: "auto" (CUDA, else MPS, else the CPU), "cpu", "cuda", "cuda:N" or "mps". Of several processes each takes
            the GPU of its number unless one is named.

    Raises:
        DeviceError: no such device here, or no such name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise DeviceError(f"device {name!r} is unknown", "choose from auto, cpu, cuda, cuda:0 (or another number), mps")
    device = torch.device(name)
    if device.type == "cuda":
        if world_size() > 1 and device.index is None:
            device = torch.device("cuda", local_rank())
        _check_cuda(name, device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            "device 'mps' is not available: this is no Mac with a GPU that PyTorch can use", _OTHER_DEVICE
        )
    return device


def check_compiler(device: torch.device) -> None:
    """Compile next to nothing, so that a missing compiler is reported at once and by name.

    Raises:
        DeviceError: torch.compile does not work here.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of the C++ or Triton compiler, each with classes of its own
        raise DeviceError(
            f"--compile does not work on {device}: {first_line(error)}",
            "it needs a C++ compiler (and Triton on a GPU); leave it out",
        ) from error


def pick_precision(name: str, device: torch.device, *, training: bool) -> Precision:
    """The precision to compute in.

    Args:
        name: "auto", "fp32", "bf16" or "fp16". "auto" is fp32 for evaluation, so that the numbers are exact; for
            training bf16 where the hardware is fast at it, fp16 on older CUDA GPUs, else fp32.
        device: where to run.
        training: whether to train rather than evaluate.

    Raises:
        UsageError: no such precision, or fp16 on the CPU.
    """
    for precision in DTYPES:
        if name == precision:
            if precision == "fp16" and device.type == "cpu":
                raise UsageError("precision 'fp16' does not go with device 'cpu'", "use --precision bf16 or fp32")
            return precision
    if name != "auto":
        raise UsageError(f"precision {name!r} is unknown", f"choose from auto, {', '.join(DTYPES)}")
    return _fast_precision(device) if training else "fp32"


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX); others emulate and lose time."""
    # Private in torch, so they may vanish; then no is safe.
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory has run out: only CUDA has a class for it, others say it in words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OUT_OF_MEMORY)


@contextmanager
def explained_out_of_memory(what: str, way_out: str, kind: type[VitpruneError] = VitpruneError) -> Iterator[None]:
    """In the block, running out of memory becomes an error that says during what, and the way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise kind(f"out of memory while {what}", way_out) from error
        raise


def _check_cuda(name: str, index: int) -> None:
    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(
            f"device {name!r} is not available: this PyTorch ({torch.__version__}) is built without CUDA",
            "use --device cpu, or install a CUDA build of torch and torchvision (https://pytorch.org/get-started)",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise DeviceError(f"device {name!r} is not available: this PyTorch sees no CUDA GPU", _OTHER_DEVICE)
    if index >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count))
        raise DeviceError(f"device {name!r} is not available: this PyTorch sees {there}", "use --device cuda")


def _fast_precision(device: torch.device) -> Precision:
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question below is about the current GPU
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and cpu_has_fast_bf16():
        return "bf16"
    return "fp32"
