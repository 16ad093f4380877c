"""Whether an exported file computes what the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from vitprune.common.progress import SILENT, Listener
from vitprune.errors import ExportError

BATCH_SIZES = (1, 1, 1, 2, 2, 5)
"""How images are dealt out. None is the size that was traced: one that got baked in shows."""

_TYPICAL = {"fp32": 1e-3, "fp16": 0.25}
"""How far the logits of the median image may be off, by precision, in standard deviations of all logits. On 300
ImageNet images and a sparse DeiT-Ti the median is 8e-6 and 6e-3, the worst 5e-5 and 0.8."""
_CLEAR = {"fp32": 0.1, "fp16": 1.0}
"""A prediction is clear if the second likeliest class is so far behind, in the same unit."""


@dataclass(frozen=True)
class Agreement:
    """An exported file beside its model, on the same images.

    Attributes:
        num_images: images compared.
        batch_sizes: how many at once.
        max_logit_difference: the greatest difference of two logits.
        typical_difference: the greatest difference of an image's logits, median of the images of one batch size, of
            the worst one; in standard deviations of all logits.
        allowed_difference: how much of that rounding explains; an export that differs by more is refused.
        num_clear: images of which the model's prediction is clear.
        num_clear_changed: those that the file puts into another class.
        top1_agreement_pct: share of images that both put into the same class, in percent.
    """

    num_images: int
    batch_sizes: tuple[int, ...]
    max_logit_difference: float
    typical_difference: float
    allowed_difference: float
    num_clear: int
    num_clear_changed: int
    top1_agreement_pct: float


@torch.inference_mode()
def compare(
    model: nn.Module, program: nn.Module, batches: Iterable[Tensor], precision: str, listener: Listener = SILENT
) -> Agreement:
    """Run both over the same images.

    A single image may differ visibly with nothing wrong: where two tokens' scores are equal to the last bits,
    rounding decides which one is kept. So the typical image has to agree closely, and every clear prediction be the
    same. The model is in fp32 and eval mode, the program, made of it, in `precision`; images are (B, C, H, W).

    Raises:
        ExportError: they differ by more than rounding.
    """
    outputs, sizes = [], []
    for images in batches:
        outputs.append((model(images).double(), program(images).double()))
        sizes.append(len(images))
        listener.advance(len(images))
    expected, found = (torch.cat(each) for each in zip(*outputs, strict=True))
    agreement = _agreement(expected, found, sizes, precision)
    if fault := _fault(agreement):
        hint = "try --precision fp32" if precision == "fp16" else "report it with the output of `vitprune env`"
        raise ExportError(f"the exported file does not compute what the model does: {fault}", hint)
    return agreement


def random_images(input_size: tuple[int, int, int]) -> Iterator[Tensor]:
    """Normal noise (C, H, W), one round of `BATCH_SIZES`; always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(sum(BATCH_SIZES)):
        yield torch.randn(input_size, generator=generator)


def in_batches(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Images (C, H, W) dealt out as `BATCH_SIZES` says, over and over."""
    remaining = iter(images)
    for size in cycle(BATCH_SIZES):
        batch = list(islice(remaining, size))
        if not batch:
            return
        yield torch.stack(batch)


def _agreement(expected: Tensor, found: Tensor, sizes: list[int], precision: str) -> Agreement:
    difference = (found - expected).abs().amax(dim=1)  # (N,)
    unit = expected.std(correction=0).clamp(min=torch.finfo(torch.float32).tiny)
    of = torch.tensor([size for size in sizes for _ in range(size)])  # the batch size that an image came in
    medians = [(difference[of == size] / unit).median().item() for size in sorted(set(sizes))]
    changed = expected.argmax(dim=1) != found.argmax(dim=1)
    clear = torch.zeros_like(changed)
    if expected.shape[1] > 1:
        best = expected.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > _CLEAR[precision] * unit
    return Agreement(
        num_images=len(expected),
        batch_sizes=tuple(sorted(set(sizes))),
        max_logit_difference=difference.max().item(),
        typical_difference=max(medians),
        allowed_difference=_TYPICAL[precision],
        num_clear=int(clear.sum()),
        num_clear_changed=int((clear & changed).sum()),
        top1_agreement_pct=100 * (1 - changed.double().mean().item()),
    )


def _fault(agreement: Agreement) -> str | None:
    """What is more than rounding."""
    if not agreement.max_logit_difference < float("inf"):  # NaN too
        return "its logits are not finite"
    if agreement.typical_difference > agreement.allowed_difference:
        return (
            f"the logits of a typical image are {agreement.typical_difference:.1e} standard deviations off, "
            f"where rounding explains {agreement.allowed_difference:g}"
        )
    if agreement.num_clear_changed:
        return f"{agreement.num_clear_changed} of {agreement.num_clear} clear predictions change class"
    return None
