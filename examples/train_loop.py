"""Your own training loop around vitprune's pieces: attach, pretrain the predictors, distil, save, load."""

from pathlib import Path

import torch
import typer
from torch.utils.data import DataLoader

import vitprune
from vitprune.data import eval_transform
from vitprune.data.demo import CLASS_NAMES, demo_images
from vitprune.loading.load import load_model


def main(keep: float = 0.7, steps: int = 100, output: Path = Path("runs/train_loop/model.safetensors")) -> None:
    """Train both phases for a number of steps each: python examples/train_loop.py --steps 20

    Runs offline on the embedded demo; put your own timm model and DataLoader in the two marked places.
    """
    torch.manual_seed(0)
    # Your model: timm.create_model("deit_small_patch16_224.fb_in1k", pretrained=True)
    teacher = load_model("demo").model
    # Your data: any loader of (images, labels); labels are ignored unless weights.ce is above 0.
    images = demo_images("train", transform=eval_transform(teacher))
    loader = DataLoader(images, batch_size=32, shuffle=True, drop_last=True)

    # The student's predictors know nothing yet; keep 1.0 is the dense model.
    student = vitprune.attach(load_model("demo").model, keep=keep)
    objective = vitprune.Objective(student, vitprune.attach(teacher, keep=1.0), vitprune.Recipe()).train()
    for phase, parameters, lr in (
        ("pretraining", student.predictors.parameters(), 1e-3),  # predictors learn the teacher's ranking of tokens
        ("deployed", student.model.parameters(), 5e-5),  # the backbone adapts to what inference does
    ):
        optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.05)
        for step in range(steps):
            if step % len(loader) == 0:
                batches = iter(loader)
            loss = objective(*next(batches), phase)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            if step % 10 == 0:
                print(phase, step, *(f"{name} {value.item():.3f}" for name, value in loss.components.items()))

    vitprune.save(student, output, CLASS_NAMES)
    sparse = vitprune.load(output)
    val = DataLoader(demo_images("val", transform=eval_transform(teacher), num_images=200), batch_size=200)
    pixels, labels = next(iter(val))
    with torch.inference_mode():
        accuracy = (sparse(pixels).argmax(dim=-1) == labels).float().mean().item()
    print(f"top-1 of the sparse model: {100 * accuracy:.1f} % on {len(labels)} images; written to {output}")


if __name__ == "__main__":
    typer.run(main)
