"""A classifier that nobody trained for it, on the embedding of a pruned encoder.

    vitprune sparsify deit_tiny_patch16_224 path/to/imagenet --checkpoint weights.safetensors --task embedding
    python examples/linear_probe.py runs/deit_tiny_patch16_224-keep0.7 path/to/imagenet --head weights.safetensors

The embedding is that of a classifier without its head (`head.weight` and `head.bias` of HEAD), which is put on the
dense and on the pruned embedding: top-1 of both on path/to/imagenet/val, with the paired 95 % interval. `--methods`
puts random tokens, class attention and ToMe at the same multiply-accumulates beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitprune.common.progress import SILENT
from vitprune.data import ModelClasses, eval_transform, open_data
from vitprune.evaluation import predict
from vitprune.jobs.compare import CompareSettings, Subject, untrained_models
from vitprune.loading.load import load_dense, load_model
from vitprune.tasks import Predictions, task_named


class Probed(nn.Module):
    """An encoder under a linear classifier."""

    def __init__(self, encoder: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoder, self.weight, self.bias = encoder, weight, bias
        self.pretrained_cfg = getattr(encoder, "pretrained_cfg", {})

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.linear(self.encoder(images), self.weight, self.bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder or model.safetensors of vitprune sparsify --task embedding")
    parser.add_argument("data")
    parser.add_argument("--head", type=Path, required=True, help="weights of the classifier that it was made from")
    parser.add_argument("--methods", default="", help="random,attention,tome")
    args = parser.parse_args()
    sparse = load_model(args.model)
    dense = load_dense(sparse, args.head).model
    state = load_file(args.head)
    weight, bias = state["head.weight"].float(), state["head.bias"].float()
    names = [name for name in args.methods.split(",") if name]
    subject = Subject(dense, ours=sparse.sparse, task=sparse.task)
    models = {"dense": dense, **untrained_models(subject, CompareSettings(names, torch.device("cpu")))}
    models["ours"] = sparse.sparse
    images = open_data(args.data, ModelClasses(len(bias))).val
    images.transform = eval_transform(dense)
    probed = {name: Probed(model, weight, bias) for name, model in models.items()}
    task = task_named("classification")
    found, _ = predict(probed, images, torch.device("cpu"), task=task, reference="dense", listener=SILENT)
    print(f"{found['dense'].num_images} images")
    print("| | top-1 | change | 95 % | same as dense | KL |\n|---|---|---|---|---|---|")
    for name, each in found.items():
        assert isinstance(each, Predictions)
        change, near = each.change(found["dense"]), each.fidelity(found["dense"])
        low, high = change["top1_points_ci95"]
        against = f"{change['top1_points']:+.2f} | {low:+.2f} to {high:+.2f} | {near['agreement_pct']:.1f} %"
        kl = "" if near["kl"] is None else f"{near['kl']:.4f}"
        print(f"| {name} | {each.top1_pct:.2f} % | {against} | {kl} |")


if __name__ == "__main__":
    main()
