"""Saliency maps drawn from the token features of a pruned DINOv2, by a decoder that nobody trained for them.

    vitprune sparsify vit_small_patch14_dinov2 path/to/imagenet --img-size 224 --checkpoint vit.safetensors \
        --task dense --keep 0.7
    python examples/dense_features.py runs/vit_small_patch14_dinov2-keep0.7 path/to/imagenet/val \
        --weights vit.safetensors --decoder decoder.safetensors

The run has learnt to give the dense model's features on the full grid. The decoder draws maps from both, at 224 and at
518 pixels: the table has their correlation, image by image (mean and 5th percentile), the mean absolute difference, and
the cosine of the features to the dense model's. Beside it the same plan untrained, and ToMe, random tokens and class
attention at the same multiply-accumulates.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vitprune import attach, load
from vitprune.backbones import input_size
from vitprune.baselines import RandomPredictor, ToMeViT, merges_per_block
from vitprune.budget.gmacs import keep_within, last_within
from vitprune.data import eval_transform, image_files, open_image, to_rgb
from vitprune.loading.load import load_model
from vitprune.measure import benchmark, count_macs, speedups
from vitprune.model import SparseViT, TokenFeatures, attach_as
from vitprune.schedule import Sparsity, schedule_for


class Decoder(nn.Module):
    """Patch tokens (B, N, 384) of a square grid to a saliency map (B, 1, H, W) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for index in range(3):
            setattr(self, f"upconv{index + 1}", nn.ConvTranspose2d(*widths[index : index + 2], 4, 2, 1))
            setattr(self, f"bn{index + 1}", nn.BatchNorm2d(widths[index + 1]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        side = math.isqrt(patches.shape[1])
        x = patches.transpose(1, 2).unflatten(2, (side, side))
        for index in (1, 2, 3):
            x = getattr(self, f"bn{index}")(getattr(self, f"upconv{index}")(x)).relu()
        return F.interpolate(self.final_conv(x), size=size, mode="bilinear", align_corners=False).sigmoid()


def load_decoder(path: Path) -> Decoder:
    decoder = Decoder()
    decoder.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=False)
    return decoder.eval()


def load_backbone(weights: Path, size: int) -> nn.Module:
    """The dense model for an image size; timm resamples its positions."""
    return load_model("vit_small_patch14_dinov2", checkpoint=weights, img_size=size, task="embedding").model.eval()


def with_plan_of(student: SparseViT, model: nn.Module) -> SparseViT:
    """The dense model under the student's plan, at the model's own image size."""
    backbone = attach(model, keep=1.0).backbone
    schedule = student.schedule.resized(backbone.num_patches, backbone.num_prefix_tokens)
    how = (student.pruned, student.balance, student.beta, student.similarity)
    return SparseViT(model, schedule, student.predictors, *how).eval()


def at_size(student: SparseViT, dense: nn.Module) -> SparseViT:
    """The student for another image size: its blocks, and the dense model's positions, which were not trained."""
    twin = copy.deepcopy(dense)
    trained = {name: tensor for name, tensor in student.model.state_dict().items() if name != "pos_embed"}
    twin.load_state_dict(trained | {"pos_embed": twin.pos_embed})
    return with_plan_of(student, twin)


def others(model: nn.Module, student: SparseViT) -> dict[str, nn.Module]:
    """Ways to spend the student's multiply-accumulates that need no training."""
    size, depth, patches = input_size(model), student.backbone.depth, student.backbone.num_patches
    budget = count_macs(student, size)

    def merging(fewer: int, late: bool) -> ToMeViT:
        return ToMeViT(model, merges_per_block(depth, -fewer, late=late))

    def by_attention(keep: float) -> SparseViT:
        return attach_as(model, Sparsity(keep, predictor="attention", balance=None))

    def at_random(keep: float) -> SparseViT:
        schedule = schedule_for(student.backbone, Sparsity(keep))
        ranks = [RandomPredictor(seed) for seed in range(len(schedule.stages))]
        return SparseViT(model, schedule, ranks, "merge", None, 0.0).eval()

    fewest = [
        last_within(budget, lambda n, late=late: count_macs(merging(n, late), size), -4 * patches, 0)
        for late in (False, True)
    ]
    return {
        "ToMe": merging(fewest[0], late=False),
        "ToMe, more in late blocks": merging(fewest[1], late=True),
        "class attention": by_attention(keep_within(budget, by_attention, size)).eval(),
        "random tokens": at_random(keep_within(budget, at_random, size)),
    }


def batches(files: list[Path], model: nn.Module, batch_size: int) -> Iterator[Tensor]:
    transform = eval_transform(model)
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        yield torch.stack([transform(to_rgb(open_image(file))) for file in chunk])


@torch.inference_mode()
def judge(models: dict[str, nn.Module], dense: nn.Module, decoder: Decoder, files: list[Path]) -> list[str]:
    """A line of the table for each model: how near its saliency maps and features are to the dense model's."""
    size = input_size(dense)[1:]
    prefix = dense.num_prefix_tokens
    means = [dense.forward_features(images)[:, prefix:].mean(dim=(0, 1)) for images in batches(files[:64], dense, 16)]
    centre = torch.stack(means).mean(dim=0)
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    for images in batches(files, dense, 16):
        target = dense.forward_features(images)[:, prefix:]
        reference = decoder(target, size)
        for name, model in models.items():
            features = model.forward_features(images)[:, prefix:]
            drawn = decoder(features, size)
            near = F.cosine_similarity(features - centre, target - centre, dim=-1).mean(dim=1)
            away = (drawn - reference).abs().mean(dim=(1, 2, 3))
            found[name].append(torch.stack((correlation(drawn, reference), away, near)))
    lines = []
    for name, parts in found.items():
        r, away, near = torch.cat(parts, dim=1)
        macs = count_macs(TokenFeatures(models[name]), input_size(dense)) / 1e9
        cells = f"{macs:.2f} | {r.mean():.4f} | {r.quantile(0.05):.4f} | {away.mean():.4f} | {near.mean():.4f}"
        lines.append(f"| {size[0]} | {name} | {cells} |")
    return lines


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's r of two maps, image by image."""
    one, other = (each.flatten(1) - each.flatten(1).mean(dim=1, keepdim=True) for each in (one, other))
    return F.cosine_similarity(one, other, dim=1)


def time_features(dense: nn.Module, student: SparseViT, seconds: float) -> None:
    """How much faster the student gives features of all patches than the dense model, on this machine."""
    models, size = {"dense": TokenFeatures(dense), "ours": TokenFeatures(student)}, input_size(dense)
    timings = benchmark(models, size, (1, 8), device=torch.device("cpu"), precision="fp32", min_seconds=seconds)
    for row in speedups("ours", timings):
        low, high = row["speedup_ci95"]
        print(
            f"{size[1]} pixels, batch {row['batch_size']}: {row['speedup']:.2f} x ({low:.2f} to {high:.2f})", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or model.safetensors of vitprune sparsify --task dense")
    parser.add_argument("images", type=Path, help="a folder of images to judge by")
    parser.add_argument("--weights", type=Path, required=True, help="of the dense vit_small_patch14_dinov2")
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="judge by so many images")
    parser.add_argument("--large", type=int, default=100, metavar="N", help="images judged at 518 pixels")
    parser.add_argument("--bench-seconds", type=float, default=20.0, help="how long each model is timed, 0 for not")
    args = parser.parse_args()
    decoder, student = load_decoder(args.decoder), load(args.run).eval()
    files = random.Random(0).sample(found := image_files(args.images), min(len(found), args.limit or len(found)))
    print("| pixels | features of | GMACs | correlation | 5th percentile | difference | cosine |")
    print("|---|---|---|---|---|---|---|")
    for size, judged in ((224, files), (518, files[: args.large])):
        if not judged:
            continue
        dense = load_backbone(args.weights, size)
        ours = at_size(student, dense)
        models = {"ours": ours, "ours, untrained": with_plan_of(student, dense), **others(dense, ours)}
        for line in judge(models, dense, decoder, judged):
            print(line, flush=True)
        if args.bench_seconds:
            time_features(dense, ours, args.bench_seconds)


if __name__ == "__main__":
    main()
