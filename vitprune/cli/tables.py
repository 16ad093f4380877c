"""A run on one screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitprune.cli.output import detail, number, print_line, print_table, signed
from vitprune.common.formatting import duration


def print_summary(report: dict[str, Any], folder: Path) -> None:
    """Print what report.json says."""
    dense, sparse, delta = report["dense"], report["sparse"], report["delta"]
    rows = [
        ["top-1 (%)", number(dense["top1_pct"]), number(sparse["top1_pct"]), signed(delta["top1_points"])],
        ["top-5 (%)", number(dense["top5_pct"]), number(sparse["top5_pct"]), ""],
        ["GMACs", number(dense["gmacs"], 3), number(sparse["gmacs"], 3), f"{delta['gmacs_pct']:+.1f} %"],
        ["parameters (M)", number(dense["params_m"], 3), number(sparse["params_m"], 3), ""],
    ]
    for before, after, change in zip(dense["speed"], sparse["speed"], delta["speedup"], strict=True):
        mark = " SLOWER" if change["slower"] else ""
        rows.append(
            [
                f"images/s at batch {before['batch_size']}",
                number(before["images_per_s"], 1),
                number(after["images_per_s"], 1),
                f"{change['speedup']:.2f} x{mark}",
            ]
        )
    print_table(f"{report['model']}, {report['label']}", ["", "dense", "sparse", "change"], rows)
    images = f"{sparse['num_images']} images"
    if delta["top1_points"] is not None:
        low, high = delta["top1_points_ci95"]
        print_line(f"top-1 {delta['top1_points']:+.2f} points on the same {images} (95 %: {low:+.2f} to {high:+.2f})")
        print_line(f"random tokens {report['random']['top1_pct']:.2f} %: ours {delta['top1_points_over_random']:+.2f}")
    print_line(
        f"same answer as dense on {delta['agreement_pct']:.1f} % of {images}; KL {delta['kl']:.3f}, "
        f"random {delta['kl_random']:.3f}"
    )
    if report["coverage"]:
        shares = report["coverage"]
        print_line(
            f"kept tokens cover {shares['sparse_pct']:.1f} % of the object, random ones {shares['random_pct']:.1f} %"
        )
    if report.get("target"):
        print_line(_kept_promise(report["target"]))
    training, dataset = report["training"], report["data"]
    if training["seconds"]:
        print_line(f"trained on {training['num_images'] / training['seconds']:.1f} images/s")
        detail(f"training: {_split(training)}")
    if training.get("warm_start_of"):
        print_line(f"warm start shared with other runs: done as for {training['warm_start_of']}")
    for count, names, what in (
        (training["num_unreadable"], training["unreadable"], "in training (repeats counted)"),
        (dataset["num_unreadable_val"], dataset["unreadable_val"], "in the evaluation"),
    ):
        if count:
            print_line(f"{count} unreadable image(s) were left out {what}: {', '.join(names[:3])}")
    skipped = training["num_skipped"]
    if skipped:
        back = "; an earlier state was put back, the rate lowered to a tenth" if training["num_restored"] else ""
        print_line(f"{skipped} training steps were skipped: loss or gradient not finite{back}")
    if training["num_parts"] > 1:
        print_line(f"each process took its part of a batch in {training['num_parts']} passes")
    print_line(f"in {duration(report['wall_s'])}, written to {folder} (its report.html shows more)")


def _split(training: dict[str, Any]) -> str:
    """Where the time of the steps went."""
    shares = {name: 100 * spent / training["seconds"] for name, spent in training["seconds_by_part"].items()}
    return ", ".join(f"{name} {share:.0f} %" for name, share in shares.items())


def _kept_promise(target: dict[str, Any]) -> str:
    """A speed asked for, promised before training, and measured after it."""
    speedup = target["speedup"]
    asked = f"{target['latency_ms']:g} ms" if speedup is None else f"{speedup:g} x dense"
    return (
        f"asked for {asked} at batch {target['batch_size']}, {target['precision']}; promised "
        f"{target['promised_speedup']:.2f} x, {target['promised_latency_ms']:.3g} ms; now "
        f"{target['measured_speedup']:.2f} x, {target['measured_latency_ms']:.3g} ms"
        + ("" if target["met"] else ": MISSED")
    )


def kept_card(folder: Path) -> str:
    """What to say of a README.md that was there and is not vitprune's."""
    return f"'{folder / 'README.md'}' is your own and was left as it is; remove it to have the model card written"
