"""Ways to run a forward pass: as it is, compiled, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from vitprune.common.formatting import first_line
from vitprune.errors import DeviceError, UsageError, VitpruneError

Mode = Literal["eager", "compile", "cudagraphs"]
"""eager: op by op. compile: torch.compile of the whole pass, which may not break the graph. cudagraphs: the eager ops,
captured once and replayed without their launches."""

_WARM_UP_PASSES = 3  # what PyTorch's documentation asks for before a capture
_COMPILED_AT_ONCE = 256


class Pass(NamedTuple):
    """A forward pass, ready to be timed.

    Attributes:
        run: over the images it was prepared with.
        run_on: over others of the same shape, dtype and device.
    """

    run: Callable[[], object]
    run_on: Callable[[Tensor], object]


def check_mode(name: str, device: torch.device) -> Mode:
    """The mode of that name, if the device can do it.

    Raises:
        UsageError: no such mode.
        DeviceError: CUDA graphs elsewhere than on CUDA.
    """
    for mode in get_args(Mode):
        if name == mode:
            if name == "cudagraphs" and device.type != "cuda":
                raise DeviceError(
                    f"mode 'cudagraphs' needs an NVIDIA GPU, not device '{device}'", "use --mode eager or compile"
                )
            found: Mode = mode
            return found
    raise UsageError(f"mode '{name}' is unknown", f"choose from {', '.join(get_args(Mode))}")


def prepare(model: nn.Module, images: Tensor, mode: Mode) -> Pass:
    """Make a model ready to run in a mode on images of this shape; takes as long as compiling takes.

    Args:
        model: in eval mode, on the device of `images`.
        images: (B, C, H, W).
        mode: how to run.

    Raises:
        VitpruneError: the model does not compile here.
    """
    if mode == "eager":
        return Pass(lambda: model(images), model)
    if mode == "compile":
        compiled = _compiled(model, images)
        return Pass(lambda: compiled(images), compiled)
    return _captured(model, images)


def _compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    # For this shape alone, which is the fastest. Models of one class share a cache, which is small by default.
    compiled: Callable[[Tensor], object] = torch.compile(model, fullgraph=True, dynamic=False)
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
    return compiled


def _captured(model: nn.Module, images: Tensor) -> Pass:
    static = images.clone()
    side: Any = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_PASSES):
            model(static)
    torch.cuda.current_stream(images.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(static)

    def run_on(others: Tensor) -> object:
        static.copy_(others, non_blocking=True)
        graph.replay()
        return out

    return Pass(graph.replay, run_on)
