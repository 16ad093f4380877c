"""Your own training loop around vitprune's pieces: attach, warm start, distil, save, load.

    python examples/train_loop.py --steps 20

Runs offline on the embedded demo; put your own timm model and DataLoader in the two marked places.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import vitprune
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.data import eval_transform
from vitprune.data.demo import DemoImages
from vitprune.loading.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=100, help="steps of each of the two phases")
    parser.add_argument("--output", type=Path, default=Path("runs/train_loop/model.safetensors"))
    args = parser.parse_args()
    torch.manual_seed(0)

    # Your model: timm.create_model("deit_small_patch16_224.fb_in1k", pretrained=True)
    model = load_model("demo").model
    # Your data: any loader of (images, labels); labels are ignored unless weights.ce is above 0.
    dataset = DemoImages("train", transform=eval_transform(model))
    loader = DataLoader(dataset, batch_size=32, shuffle=True, drop_last=True)

    # The student's predictors know nothing yet; keep 1.0 is the dense model.
    student = vitprune.attach(copy.deepcopy(model), keep=args.keep, schedule="late", dropped="fold")
    teacher = vitprune.attach(model, keep=1.0)
    objective = vitprune.Objective(student, teacher, vitprune.Recipe())

    for phase, parameters, lr in (
        ("warm", student.predictors.parameters(), 1e-3),  # predictors learn the teacher's ranking of tokens
        ("deployed", student.model.parameters(), 5e-5),  # the backbone adapts to what inference does
    ):
        optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.05)
        objective.train()
        for step, (images, labels) in zip(range(args.steps), _endless(loader), strict=False):
            loss = objective(images, labels, phase)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            if step % 10 == 0:
                shown = " ".join(f"{name} {value.item():.3f}" for name, value in loss.components.items())
                print(f"{phase} {step}: {shown}")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    save(student, args.output, describe(student, name="demo", class_names=DemoImages.class_names))

    sparse = vitprune.load(args.output)
    val = DemoImages("val", transform=eval_transform(model), num_images=200)
    images, labels = next(iter(DataLoader(val, batch_size=200)))
    with torch.inference_mode():
        accuracy = (sparse(images).argmax(dim=-1) == labels).float().mean().item()
    print(f"top-1 of the sparse model: {100 * accuracy:.1f} % on {len(labels)} images; written to {args.output}")


def _endless(loader: DataLoader):
    while True:
        yield from loader


if __name__ == "__main__":
    main()
