"""Token features of a pruned DINOv2 under a saliency head that nobody trained for it.

    python examples/dense_features.py --weights vit.safetensors --decoder decoder.safetensors --images path/to/images

IMAGES has train/ and val/, labels are not used. The backbone is pruned to the cost of the default plan of --keep and
learns from its dense self to give the same features on the full grid. The decoder then draws saliency maps from dense
and from pruned features, at 224 and at 518 pixels: the table has their correlation, image by image (mean and 5th
percentile), the mean absolute difference, and the cosine of the features to the dense model's. Beside it ToMe, random
tokens and class attention at the same multiply-accumulates. --hold-out N judges by N images of train/ instead of val/,
to choose settings by.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitprune import attach
from vitprune.backbones import input_size
from vitprune.baselines import RandomPredictor, ToMeViT, merges_per_block
from vitprune.budget.gmacs import keep_for_gmacs, keep_within, last_within
from vitprune.common.devices import DTYPES, pick_precision
from vitprune.data import eval_transform, image_files, open_image, to_rgb
from vitprune.loading.load import load_model
from vitprune.measure import benchmark, count_macs, speedups
from vitprune.model import SparseViT, TokenFeatures, attach_as
from vitprune.schedule import Sparsity
from vitprune.tokens.losses import features_loss
from vitprune.tokens.predictor import NormPredictor

STAGES = (1, 3, 5, 7, 9, 11)
PLAN = {"balance": 0.0, "beta": 0.0, "similarity": "keys"}
"""Redundancy alone decides, by keys: every patch counts, and many small steps lose less than few large ones."""


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


def student_of(model: nn.Module, keep: float) -> SparseViT:
    """A sparse twin of the model, at the cost of the default plan of this keep ratio."""
    budget = count_macs(attach(model, keep), input_size(model)) / 1e9
    plan = keep_for_gmacs(model, Sparsity(prune_at=STAGES, **PLAN), budget)
    student = attach_as(copy.deepcopy(model), plan)
    # The longest token stands first; what comes first matters little where redundancy alone decides.
    by_norm = [NormPredictor() for _ in student.schedule.stages]
    return SparseViT(student.model, student.schedule, by_norm, "merge", 0.0, 0.0, "keys").eval()


def others(model: nn.Module, student: SparseViT) -> dict[str, nn.Module]:
    """Ways to spend the student's multiply-accumulates that need no training."""
    size, depth, patches = input_size(model), student.backbone.depth, student.backbone.num_patches
    budget = count_macs(student, size)

    def merging(fewer: int, late: bool) -> ToMeViT:
        return ToMeViT(model, merges_per_block(depth, -fewer, late=late))

    def by_attention(keep: float) -> SparseViT:
        return attach_as(model, Sparsity(keep, predictor="attention", balance=None))

    def at_random(keep: float) -> SparseViT:
        schedule = Sparsity(keep).plan(student.backbone)
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


def train(student: SparseViT, teacher: nn.Module, files: list[Path], steps: int, batch_size: int, lr: float) -> None:
    """Distil the features of all patches into norms, biases and layer scales from the first stage on.

    So few steps bring more noise into the matrices than they mend: with these the features come out worse.
    """
    first = student.schedule.blocks[0]
    dense = attach(teacher, keep=1.0)
    later = [parameter for module in student.backbone.tail(first) for parameter in module.parameters()]
    student.model.requires_grad_(False)
    # A norm may be in the tail twice, as the encoder's and as the model's.
    parameters = [parameter.requires_grad_() for parameter in dict.fromkeys(later) if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    shape = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    order = random.Random(0)
    pool: list[Path] = []
    precision = pick_precision("auto", torch.device("cpu"), training=True)
    started, recent = time.perf_counter(), []
    for step in range(1, steps + 1):
        if len(pool) < batch_size:
            pool = order.sample(files, len(files))
        chunk, pool = pool[:batch_size], pool[batch_size:]
        images = next(batches(chunk, teacher, batch_size))
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
            with torch.no_grad():
                x = dense.backbone.embed(images)
                for block in range(first):
                    x = dense.backbone.block(block, x)
                target = dense.select_from(x, first).features
            features = student.select_from(x, first, filled=True).filled
        loss = features_loss(features, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shape.step()
        recent = [*recent[-24:], loss.item()]
        if step % 25 == 0 or step == steps:
            pace = (time.perf_counter() - started) / step
            print(f"step {step}: loss {sum(recent) / len(recent):.4f}, {pace:.2f} s a step", flush=True)


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


def at_size(student: SparseViT, dense: nn.Module) -> SparseViT:
    """The student for another image size: its blocks, and the dense model's positions, which were not trained."""
    twin = copy.deepcopy(dense)
    trained = {name: tensor for name, tensor in student.model.state_dict().items() if name != "pos_embed"}
    twin.load_state_dict(trained | {"pos_embed": twin.pos_embed})
    backbone = attach(twin, keep=1.0).backbone
    schedule = student.schedule.resized(backbone.num_patches, backbone.num_prefix_tokens)
    return SparseViT(twin, schedule, student.predictors, "merge", 0.0, 0.0, "keys").eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="of timm's vit_small_patch14_dinov2")
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder with train/ and val/")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hold-out", type=int, metavar="N", help="judge by N images of train/ instead of val/")
    parser.add_argument("--limit", type=int, help="judge by so many images")
    parser.add_argument("--large", type=int, default=100, metavar="N", help="images judged at 518 pixels")
    parser.add_argument("--bench-seconds", type=float, default=20.0, help="how long each model is timed, 0 for not")
    parser.add_argument("--output", type=Path, help="where to write the student's weights")
    args = parser.parse_args()
    torch.manual_seed(0)
    decoder, dense = load_decoder(args.decoder), load_backbone(args.weights, 224)
    training = random.Random(0).sample(found := image_files(args.images / "train"), len(found))
    judged = training[: args.hold_out] if args.hold_out else image_files(args.images / "val")
    training = training[args.hold_out or 0 :]
    judged = random.Random(0).sample(judged, min(len(judged), args.limit or len(judged)))
    student = student_of(dense, args.keep)
    print(student.plan, flush=True)
    untrained = copy.deepcopy(student)
    if args.steps:
        train(student, dense, training, args.steps, args.batch_size, args.lr)
    if args.output:
        save_file(student.model.state_dict(), args.output)
    print("\n| pixels | features of | GMACs | correlation | 5th percentile | difference | cosine |")
    print("|---|---|---|---|---|---|---|")
    ours = {"ours": student, "ours, untrained": untrained}
    for line in judge({**ours, **others(dense, student)}, dense, decoder, judged):
        print(line, flush=True)
    if args.large:
        large = load_backbone(args.weights, 518)
        ours = {name: at_size(each, large) for name, each in ours.items()}
        for line in judge({**ours, **others(large, ours["ours"])}, large, decoder, judged[: args.large]):
            print(line, flush=True)
    if args.bench_seconds:
        time_features(dense, student, args.bench_seconds)
        if args.large:
            time_features(large, ours["ours"], args.bench_seconds)


def time_features(dense: nn.Module, student: SparseViT, seconds: float) -> None:
    """How much faster the student gives features of all patches than the dense model, on this machine."""
    models, size = {"dense": TokenFeatures(dense), "ours": TokenFeatures(student)}, input_size(dense)
    timings = benchmark(models, size, (1, 8), device=torch.device("cpu"), precision="fp32", min_seconds=seconds)
    for row in speedups("ours", timings):
        low, high = row["speedup_ci95"]
        print(
            f"{size[1]} pixels, batch {row['batch_size']}: {row['speedup']:.2f} x ({low:.2f} to {high:.2f})", flush=True
        )


if __name__ == "__main__":
    main()
