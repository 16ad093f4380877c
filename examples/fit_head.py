"""A multi-label or a regression head on the frozen features of a classifier, to try `--task` with.

    python examples/fit_head.py multilabel deit_tiny_patch16_224 path/to/imagenet --checkpoint weights.safetensors
    vitprune sparsify deit_tiny_patch16_224 path/to/imagenet --checkpoint multilabel.safetensors --task multilabel \
        --labels multilabel.jsonl --keep 0.7

path/to/imagenet has train/ and val/ with a folder per WordNet id. The labels of "multilabel" are the groups of classes
that follow each other in ImageNet's order (fish, birds, dogs, ...) and what the pixels say (bright, colourful, warm,
contrasty): 20 in all, several an image. The values of "regression" are the mean brightness and the contrast, in [0, 1].
Only the head is fitted, on train/: by logistic or ridge regression.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor

GROUPS = {
    "fish": 0,
    "birds": 7,
    "amphibians and reptiles": 25,
    "spiders": 69,
    "more birds": 80,
    "marsupials and molluscs": 102,
    "water birds": 127,
    "dogs": 151,
    "wild dogs and cats": 269,
    "bears": 294,
    "insects": 300,
    "sea animals": 327,
    "mammals": 330,
    "more fish": 389,
    "things": 398,
    "food and places": 924,
}
"""Where each group of classes begins."""
ATTRIBUTES = ("bright", "colourful", "warm", "contrasty")
VALUES = ("brightness", "contrast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("multilabel", "regression"))
    parser.add_argument("model", help="a timm name")
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of the classifier, .safetensors")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for TASK.safetensors and TASK.jsonl")
    args = parser.parse_args()
    model = timm.create_model(args.model, num_classes=0).eval()
    model.load_state_dict(load_file(args.checkpoint), strict=False)
    rows = {split: list(described(args.data / split)) for split in ("train", "val")}
    cuts = quartiles([row for _, row in rows["train"]])
    names = (*GROUPS, *ATTRIBUTES) if args.task == "multilabel" else VALUES
    targets = {split: [target(args.task, row, cuts) for _, row in of] for split, of in rows.items()}
    features = features_of(model, [args.data / "train" / name for name, _ in rows["train"]])
    fit = logistic if args.task == "multilabel" else ridge
    weight, bias = fit(features, torch.stack(targets["train"]))
    args.output.mkdir(parents=True, exist_ok=True)
    weights = args.output / f"{args.task}.safetensors"
    save_file(model.state_dict() | {"head.weight": weight, "head.bias": bias}, weights)
    with (args.output / f"{args.task}.jsonl").open("w", encoding="utf-8") as file:
        for split, of in rows.items():
            for (name, _), each in zip(of, targets[split], strict=True):
                file.write(json.dumps({"file_name": f"{split}/{name}"} | written(args.task, names, each)) + "\n")
    print(f"{weights}: {len(names)} outputs, {', '.join(names)}; fitted on {len(features)} images")


def described(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """Each image's path below `folder`, its class and what its pixels say."""
    indices = {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return [
        (str(path.relative_to(folder)), {"class": indices[path.parent.name]} | looks(path))
        for path in sorted(folder.glob("*/*"))
    ]


def looks(path: Path) -> dict[str, float]:
    """Brightness, contrast, colourfulness and warmth of an image, each in [0, 1] or near it."""
    with Image.open(path) as image:
        raw = torch.frombuffer(bytearray(image.convert("RGB").resize((32, 32)).tobytes()), dtype=torch.uint8)
    pixels = raw.reshape(-1, 3).float() / 255
    grey = pixels.mean(dim=1)
    return {
        "brightness": grey.mean().item(),
        "contrast": grey.std().item(),
        "colourful": (pixels.amax(dim=1) - pixels.amin(dim=1)).mean().item(),
        "warm": (pixels[:, 0] - pixels[:, 2]).mean().item(),
    }


def quartiles(rows: list[dict[str, float]]) -> dict[str, float]:
    """What a quarter of the images exceed."""
    keys = ("brightness", "contrast", "colourful", "warm")
    return {key: torch.tensor([row[key] for row in rows]).quantile(0.75).item() for key in keys}


def target(task: str, row: dict[str, float], cuts: dict[str, float]) -> Tensor:
    """What an image's outputs should be."""
    if task == "regression":
        return torch.tensor([row[key] for key in VALUES])
    group = max(number for number, first in enumerate(GROUPS.values()) if first <= row["class"])
    said = [float(row[key] > cuts[key]) for key in ("brightness", "colourful", "warm", "contrast")]
    return torch.tensor([float(number == group) for number in range(len(GROUPS))] + said)


def written(task: str, names: tuple[str, ...], each: Tensor) -> dict[str, Any]:
    """A line of the file of labels."""
    if task == "regression":
        return dict(zip(names, each.tolist(), strict=True))
    return {"labels": [index for index, value in enumerate(each.tolist()) if value]}


@torch.inference_mode()
def features_of(model: torch.nn.Module, paths: list[Path]) -> Tensor:
    """What the head reads, (images, C)."""
    transform, found = create_transform(**resolve_model_data_config(model)), []
    for first in range(0, len(paths), 32):
        images = [transform(Image.open(path).convert("RGB")) for path in paths[first : first + 32]]
        found.append(model(torch.stack(images)))
    return torch.cat(found)


def ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of least squares with a small penalty."""
    x, y = (each.double() - each.double().mean(dim=0) for each in (features, targets))
    penalty = 1e-2 * x.square().mean() * len(x)
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y).T
    bias = targets.double().mean(dim=0) - weight @ features.double().mean(dim=0)
    return weight.float().contiguous(), bias.float()


def logistic(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one logistic regression a label, with a small penalty."""
    features = features.clone()  # out of inference mode
    weight = torch.zeros(targets.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = features @ weight.T + bias
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets) + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


if __name__ == "__main__":
    main()
