"""One real architecture of each supported family at full size: is it right, and what does dropping tokens bring?

    python examples/families.py
    python examples/families.py --models beit_base_patch16_224,cait_xxs24_224 --batch-size 1

Weights are random, with attention lively enough for masking to matter; no network and no images are needed. "keep 1"
is the largest difference from timm's own output, "masked" that between the training pass and the deployed one.
"""

from __future__ import annotations

import argparse

import timm
import torch

from vitprune import attach
from vitprune.backbones import family_of, input_size
from vitprune.measure import benchmark, count_macs

MODELS = (
    "deit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "vit_small_r26_s32_224",
    "eva02_small_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_pe_core_small_patch16_384",
    "vit_small_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "cait_xxs24_224",
    "naflexvit_base_patch16_gap",
    "qwen3_vit_88m",
    "lvvit_s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each model is timed")
    args = parser.parse_args()
    print("| family | model | keep 1 | masked | GMACs | images/s | speed-up |\n|---|---|---|---|---|---|---|")
    for name in args.models.split(","):
        print(row(name, args.keep, args.img_size, args.batch_size, args.seconds), flush=True)


@torch.no_grad()
def row(name: str, keep: float, img_size: int, batch_size: int, seconds: float) -> str:
    """A line of the table."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=img_size, num_classes=1000).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, biases and LayerScale as if trained
            parameter.add_(0.1 * torch.randn_like(parameter))
    sparse = attach(model, keep, token_schedule="late", pruned="merge").eval()
    dense = attach(model, 1.0)
    images = torch.randn(2, *input_size(model))
    exact = (dense(images) - model(images)).abs().max().item()
    masked = (sparse.forward_masked(images).logits - sparse(images)).abs().max().item()
    size = input_size(model)
    macs = [count_macs(each, size) / 1e9 for each in (dense, sparse)]
    models = {"dense": model, "sparse": sparse}
    timings = benchmark(models, size, (batch_size,), device=torch.device("cpu"), precision="fp32", min_seconds=seconds)
    speed = {timing.model: timing.images_per_s for timing in timings}
    cells = [
        family_of(model),
        name,
        f"{exact:.0e}",
        f"{masked:.0e}",
        f"{macs[0]:.2f} > {macs[1]:.2f}",
        f"{speed['dense']:.1f} > {speed['sparse']:.1f}",
        f"{speed['sparse'] / speed['dense']:.2f} x",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
