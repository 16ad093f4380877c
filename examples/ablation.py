"""What each part of the short recipe brings: one run per variant, on images held out of the training folder.

    python examples/ablation.py deit_tiny --data path/to/imagenet --output ablation --variants default,importance-alone
    python examples/ablation.py demo --variants default,pretraining-only

Settings are chosen on held-out training images so that the val folder can still prove something. `--hold-out 600`
puts that many images of DATA/train aside (symbolic links, always the same ones, at most ten of a class) and every
variant trains on the rest. Runs that are there already are read, not repeated. What follows `--` goes to
`vitprune sparsify` as it is (`-- --checkpoint FILE --keep 0.5`).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no-pretraining": {"pretraining_steps": 0},
    "pretraining-only": {"steps": 0},
    "half-the-steps": {"steps": 150},
    "twice-the-steps": {"steps": 600},
    "batch-64": {"batch_size": 64, "steps": 150},
    "half-sampled": {"deployed_share": 0.5},
    "importance-alone": {"balance": None, "beta": 0.0},
    "plain-average": {"beta": 0.0},
    "balance-.05": {"balance": 0.05},
    "balance-.2": {"balance": 0.2},
    "beta-2": {"beta": 2.0},
    "drop": {"pruned": "drop"},
    "geometric": {"token_schedule": "geometric"},
    "paper-predictor": {"predictor": "paper"},
    "ema": {"ema_decay": 0.98},
    "token-loss": {"weights": {"token": 0.5}},
    "kl-alone": {"weights": {"pooled": 0.0}},
    "train-trunk": {"train_trunk": True},
    "gradient-target": {"pretraining_target": "gradient"},
    "both-targets": {"pretraining_target": "both"},
    "half-the-rate": {"backbone_lr_scale": 0.02},
    "twice-the-rate": {"backbone_lr_scale": 0.08},
    "mixup": {"augmentation": {"mixup": 0.8, "cutmix": 1.0}},
}
"""What differs from the short recipe, by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for vitprune sparsify")
    parser.add_argument("--data", default="demo", help="a folder with train/ (and val/), or demo")
    parser.add_argument("--hold-out", type=int, metavar="N", help="judge by N images of train/ instead of val/")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--variants", default="all", help=f"all, or some of {','.join(VARIANTS)}")
    mine, options = sys.argv[1:], []
    if "--" in mine:
        mine, options = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    args = parser.parse_args(mine)
    names = list(VARIANTS) if args.variants == "all" else args.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"no variant '{unknown[0]}'; choose from {', '.join(VARIANTS)}")
    if args.hold_out and not (Path(args.data) / "train").is_dir():
        parser.error(f"--hold-out needs a folder train/ in --data, and '{args.data}' has none")
    args.output.mkdir(parents=True, exist_ok=True)
    data = args.data
    if args.hold_out:
        data = str(hold_out(Path(data), args.output / "images", args.hold_out))
    print("| variant | top-1 change | rare classes | same prediction | KL from dense | minutes |")
    print("|---|---|---|---|---|---|")
    for name in names:
        folder = args.output / name
        if not (folder / "report.json").exists():
            sparsify(args.model, data, folder, VARIANTS[name], options)
        print(row(name, json.loads((folder / "report.json").read_text())), flush=True)


def hold_out(data: Path, output: Path, count: int) -> Path:
    """DATA's train folder parted into train/ and val/ by symbolic links, unless that is done."""
    if output.exists():
        return output
    images = sorted(path for path in (data / "train").glob("*/*") if path.is_file())
    random.Random(0).shuffle(images)
    held: Counter[str] = Counter()
    for path in images:
        # At most ten of a class, so that frequent classes do not drown the others.
        chosen = held.total() < count and held[path.parent.name] < 10
        held[path.parent.name] += chosen
        link = output / ("val" if chosen else "train") / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return output


def sparsify(model: str, data: str, folder: Path, changes: dict[str, Any], options: list[str]) -> None:
    """One run, with the short recipe's settings but for `changes`."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(changes))
    command = [sys.executable, "-m", "vitprune", "sparsify", model, "--data", data, "--output", str(folder)]
    # A run that was stopped has a folder but no report. Its summary goes to stderr: stdout is for the table.
    subprocess.run([*command, "--overwrite", "--recipe", str(recipe), *options], check=True, stdout=sys.stderr)


def row(name: str, report: dict[str, Any]) -> str:
    """A line of the table."""
    delta = report["delta"]
    low, high = delta["top1_points_ci95"]
    cells = [
        name,
        f"{delta['top1_points']:+.2f} ({low:+.2f} to {high:+.2f})",
        _rare(report.get("rare")),
        f"{delta['agreement_pct']:.1f} %",
        f"{delta['kl']:.4f}",
        f"{report['seconds'] / 60:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _rare(rare: dict[str, Any] | None) -> str:
    """Change of top-1 on the classes of few training images, of which training can have learnt little."""
    return "-" if rare is None else f"{rare['top1_points']:+.2f} on {rare['num_images']}"


if __name__ == "__main__":
    main()
