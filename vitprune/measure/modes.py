"""Ways to run a forward pass: as it is, compiled, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from vitprune.common.formatting import first_line
from vitprune.errors import DeviceError, UsageError, VitpruneError

Mode = Literal["eager", "compile", "cudagraphs"]
"""eager: op by op. compile: torch.compile of the whole pass, which may not break the graph: one for a batch of 1 and
one for all others, as `vitprune.load(..., compile=True)` has it. cudagraphs: the eager ops, captured once and replayed
without their launches."""

_WARM_UP_PASSES = 3  # what PyTorch's documentation asks for before a capture
_COMPILED_AT_ONCE = 256


def check_mode(name: str, device: torch.device) -> Mode:
    """The mode of that name, if the device can do it.

    Raises:
        UsageError: no such mode.
        DeviceError: CUDA graphs elsewhere than on CUDA.
    """
    if name not in get_args(Mode):
        raise UsageError(f"mode '{name}' is unknown", f"choose from {', '.join(get_args(Mode))}")
    if name == "cudagraphs" and device.type != "cuda":
        raise DeviceError(
            f"mode 'cudagraphs' needs an NVIDIA GPU, not device '{device}'", "use --mode eager or compile"
        )
    return cast(Mode, name)


def prepare(model: nn.Module, images: Tensor, mode: Mode) -> Callable[[], object]:
    """The forward pass over these images (B, C, H, W) in a mode; takes as long as compiling takes.

    The model is in eval mode, on the device of the images.

    Raises:
        VitpruneError: the model does not compile here.
    """
    if mode == "eager":
        return lambda: model(images)
    return _compiled(model, images) if mode == "compile" else _captured(model, images)


def _compiled(model: nn.Module, images: Tensor) -> Callable[[], object]:
    # Models of one class share a cache, which is small by default.
    compiled: Callable[[Tensor], object] = torch.compile(model, fullgraph=True, dynamic=True)
    limits = {"recompile_limit": _COMPILED_AT_ONCE, "accumulated_recompile_limit": _COMPILED_AT_ONCE}
    try:
        with torch._dynamo.config.patch(limits):
            compiled(images)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of tracing, lowering or the C++ or Triton compiler, each with classes of its own
        raise VitpruneError(
            f"torch.compile of a {type(model).__name__} failed: {first_line(error)}",
            "it needs a C++ compiler (and Triton on a GPU); or use --mode eager",
        ) from error
    return lambda: compiled(images)


def _captured(model: nn.Module, images: Tensor) -> Callable[[], object]:
    side: Any = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_PASSES):
            model(images)
    torch.cuda.current_stream(images.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(images)

    def replay() -> object:
        graph.replay()
        return out

    return replay
