"""What one forward pass needs in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate, chain

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

_MIB = 2**20


def peak_memory_mib(run: Callable[[], object], model: nn.Module, images: Tensor) -> float | None:
    """Weights, images, and the largest sum of what a pass allocates through PyTorch at one time, in MiB.

    As if no other model were there. What libraries allocate for themselves, and the interpreter, do not count.

    Args:
        run: the pass.
        model: whose it is.
        images: what it reads.

    Returns:
        None on devices that do not tell (MPS), and for an exported file, whose runtime allocates for itself.
    """
    if hasattr(model, "structure"):
        return None
    if images.device.type == "cuda":
        activations = _cuda_peak(run, images.device)
    elif images.device.type == "cpu":
        activations = _cpu_peak(run)
    else:
        return None
    own = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers(), [images]))
    return (activations + own) / _MIB


def _cuda_peak(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(run: Callable[[], object]) -> int:
    """From PyTorch's profiler, which sees every allocation and every release of the CPU's allocator."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells stderr of its start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes: list[int] = [event.nbytes() for event in events]
    return max(accumulate(sizes, initial=0))
