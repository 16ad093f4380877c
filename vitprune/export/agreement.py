"""Whether an exported file computes what the model computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from vitprune.common.progress import SILENT, Listener
from vitprune.errors import ExportError
from vitprune.tasks import Task

BATCH_SIZES = (1, 1, 1, 2, 2, 5)
"""How images are dealt out. None is the size that was traced: one that got baked in shows."""

_TYPICAL = {"fp32": 1e-3, "fp16": 0.25, "int8": 0.8}
"""How far the outputs of the median image may be off, by precision, in units of how far outputs lie apart.

Of a sparse DeiT-Ti's logits, values, embeddings and features at keep 0.7, on noise and on ImageNet, a dozen images give
at most 2e-5 and 0.16 in 99 draws of 100, a single one up to 5e-5 and 0.8; at keep 0.3, where few tokens decide,
features 0.4 in fp16. In 8 bits its logits are up to 0.6 off; there it is decisions that count. A program that always
gives the same is off by 1, one that prunes nothing by 0.2 to 0.9."""
_CLEAR = {"fp32": 0.1, "fp16": 1.0, "int8": 1.0}
"""What an output decides is clear if it is so far from deciding otherwise, in the same unit."""


@dataclass(frozen=True)
class Agreement:
    """An exported file beside its model, on the same images.

    Attributes:
        num_images: images compared.
        batch_sizes: how many at once.
        max_difference: the greatest difference of two outputs (logits, values, numbers of a vector).
        typical_difference: how far an image's outputs are off, by the task's `differences`, in standard deviations;
            median of the images of one batch size, of the worst one.
        allowed_difference: how much of that rounding explains; an export that differs by more is refused.
        num_clear: decisions of the model that are clear: an image's class, or each of its labels; None of outputs that
            decide nothing.
        num_clear_changed: those that the file decides otherwise.
        agreement_pct: share of all decisions that are the same, in percent.
    """

    num_images: int
    batch_sizes: tuple[int, ...]
    max_difference: float
    typical_difference: float
    allowed_difference: float
    num_clear: int | None
    num_clear_changed: int | None
    agreement_pct: float | None


@torch.inference_mode()
def compare(
    model: nn.Module,
    program: nn.Module,
    batches: Iterable[Tensor],
    precision: str,
    task: Task,
    listener: Listener = SILENT,
    min_agreement: float | None = None,
) -> Agreement:
    """Run both over the same images.

    A single image may differ visibly with nothing wrong: where two tokens' scores are equal to the last bits,
    rounding decides which one is kept. So the typical image has to agree closely, and every clear decision be the
    same. The model is in fp32 and eval mode, the program, made of it, in `precision`; images are (B, C, H, W).
    Eight bits change clear decisions too: of them `min_agreement` says how many, in percent of all, must stay.

    Raises:
        ExportError: they differ by more than rounding.
    """
    outputs, sizes = [], []
    for images in batches:
        pair = model(images).float(), program(images).float()
        if pair[0].shape != pair[1].shape:
            wrong, right = (tuple(each.shape) for each in reversed(pair))
            raise _wrong(f"of {len(images)} images its {task.outputs} are {wrong}, and the model's {right}", precision)
        outputs.append(pair)
        sizes.append(len(images))
        listener.advance(len(images))
    expected, found = (torch.cat(each) for each in zip(*outputs, strict=True))
    agreement = _agreement(expected, found, sizes, precision, task)
    if fault := _fault(agreement, task, min_agreement):
        raise _wrong(fault, precision)
    return agreement


def batch_sizes(batch: int | None) -> tuple[int, ...]:
    """How images are dealt out to a program for batches of this size, or of any; a dozen images at least."""
    return BATCH_SIZES if batch is None else (batch,) * math.ceil(sum(BATCH_SIZES) / batch)


def random_images(input_size: tuple[int, int, int], count: int = sum(BATCH_SIZES)) -> Iterator[Tensor]:
    """Normal noise (C, H, W); always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(input_size, generator=generator)


def in_batches(images: Iterable[Tensor], sizes: Sequence[int] = BATCH_SIZES) -> Iterator[Tensor]:
    """Images (C, H, W) dealt out in these sizes, over and over."""
    remaining = iter(images)
    for size in cycle(sizes):
        batch = list(islice(remaining, size))
        if not batch:
            return
        yield torch.stack(batch)


def _agreement(expected: Tensor, found: Tensor, sizes: list[int], precision: str, task: Task) -> Agreement:
    differences = task.differences(found, expected)  # (N,)
    of = torch.tensor([size for size in sizes for _ in range(size)])  # the batch size that an image came in
    medians = [differences[of == size].median().item() for size in sorted(set(sizes))]
    num_clear = num_changed = share = None
    decided, again, margins = task.decisions(expected), task.decisions(found), task.margins(expected)
    if decided is not None and again is not None and margins is not None:
        changed, clear = decided != again, margins > _CLEAR[precision]
        num_clear, num_changed = int(clear.sum()), int((clear & changed).sum())
        share = 100 * (1 - changed.double().mean().item())
    return Agreement(
        num_images=len(expected),
        batch_sizes=tuple(sorted(set(sizes))),
        max_difference=(found - expected).abs().max().item(),
        typical_difference=max(medians),
        allowed_difference=_TYPICAL[precision],
        num_clear=num_clear,
        num_clear_changed=num_changed,
        agreement_pct=share,
    )


def _fault(agreement: Agreement, task: Task, min_agreement: float | None) -> str | None:
    """What is more than rounding, or than was allowed."""
    if not agreement.max_difference < float("inf"):  # NaN too
        return f"its {task.outputs} are not finite"
    if agreement.typical_difference > agreement.allowed_difference:
        return (
            f"the {task.outputs} of a typical image are {agreement.typical_difference:.1e} standard deviations off, "
            f"where rounding explains {agreement.allowed_difference:g}"
        )
    if min_agreement is not None:
        share = agreement.agreement_pct
        if share is None or share >= min_agreement:
            return None
        return f"{share:.1f} % of {task.decides} decisions are the same, and at least {min_agreement:g} % must be"
    if agreement.num_clear_changed:
        return f"{agreement.num_clear_changed} of {agreement.num_clear} clear {task.decides} decisions change"
    return None


def _wrong(fault: str, precision: str) -> ExportError:
    hint = "report it with the output of `vitprune env`" if precision == "fp32" else "try --precision fp32"
    if precision == "int8":
        hint = "calibrate on more images, try --precision fp16, or lower --min-agreement"
    return ExportError(f"the exported file does not compute what the model does: {fault}", hint)
