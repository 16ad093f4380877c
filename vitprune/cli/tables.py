"""Results on one screen: of a run, a benchmark, a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitprune.cli.output import number, print_line, print_table
from vitprune.common.formatting import duration

if TYPE_CHECKING:
    from vitprune.report.schema import Report, Target
    from vitprune.report.sweep_page import Judged


def print_summary(report: Report, folder: Path) -> None:
    """Print what report.json says."""
    from vitprune.report.tables import figure_rows, plain_figures, ratio_rows, speed_rows, unreadable, verdict

    fig = plain_figures(report)
    rows = figure_rows(report, fig, fidelity=False)
    for batch_size, dense_rate, sparse_rate, *_, change in speed_rows(report, fig, str):
        rows.append([f"images/s at batch {batch_size}", dense_rate, sparse_rate, change])
    print_line(verdict(report))
    print_table(f"{report.model}, {report.label}", ["", "dense", "sparse", "change"], rows)
    columns, ratios = ratio_rows(report, fig, str)
    if ratios:
        low, high = report.keep_range or (None, None)
        print_table(f"one training, every keep ratio from {low} to {high}", columns, ratios)
    print_line(_likeness_said(report))
    if report.coverage:
        shares = report.coverage
        print_line(
            f"kept tokens cover {shares['sparse_pct']:.1f} % of the object, random ones {shares['random_pct']:.1f} %"
        )
    if report.target is not None:
        print_line(_kept_target(report.target))
    training = report.training
    for count, names, what in unreadable(report):
        print_line(f"{count} unreadable image(s) were left out {what}: {', '.join(names)}")
    if training.num_skipped:
        print_line(f"{training.num_skipped} training steps were skipped: loss or gradient not finite")
    if training.num_microbatches > 1:
        print_line(f"each process took its part of a batch in {training.num_microbatches} passes")
    rate = f", training {training.num_images / training.seconds:.1f} images/s" if training.seconds else ""
    print_line(f"in {duration(report.seconds)}{rate}; written to {folder} (its report.html shows more)")


def _likeness_said(report: Report) -> str:
    """How close the sparse model is to the dense one, and what the random baseline gives."""
    from vitprune.report.tables import headline, plain_figures
    from vitprune.tasks import task_named

    fig, found, task = plain_figures(report), headline(report), task_named(report.task)
    of_random = [*(found or ())[:1], *dict.fromkeys((task.fidelity[0], task.finest))]
    ours, by_chance = (
        ", ".join(each.said(fig(f"{of}.{each.key}", each.digits)) for each in figures)
        for of, figures in (("delta", task.fidelity), ("random", of_random))
    )
    return f"{ours}; random baseline: {by_chance}"


def _kept_target(target: Target) -> str:
    """A speed asked for, predicted before training, and measured after it."""
    asked = f"{target.latency_ms:g} ms" if target.speedup is None else f"{target.speedup:g} x dense"
    return (
        f"target {asked} at batch {target.batch_size}, {target.precision}; predicted "
        f"{target.predicted_speedup:.2f} x, {target.predicted_latency_ms:.3g} ms; measured "
        f"{target.measured_speedup:.2f} x, {target.measured_latency_ms:.3g} ms" + ("" if target.met else ": MISSED")
    )


def speedup_text(change: Mapping[str, Any]) -> str:
    """As in "1.39 x", with what must not be left out."""
    from vitprune.measure import remark

    return f"{change['speedup']:.2f} x {remark(change['slower'], change['speedup_ci95'])}".rstrip()


_BENCH_SPEED = ["", "batch", "images/s", "ms a batch", "fewer MACs", "measured", "over bound"]
_BENCH_MORE = ["", "batch", "p50 ms", "p90 ms", "p99 ms", "MiB", "GMACs", "efficiency"]


def print_bench(rows: list[dict[str, Any]], where: str) -> None:
    """Two tables per model and mode, and what their columns mean."""
    from vitprune.measure import unclear

    for model, mode in dict.fromkeys((row["model"], row["mode"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["mode"]) == (model, mode)]
        print_table(f"{model}, {mode}", _BENCH_SPEED, [_bench_speed(row) for row in chosen])
        print_table("single passes, memory, MACs", _BENCH_MORE, [_bench_more(row) for row in chosen])
    print_line(where)
    print_line("timed interleaved; ms a batch: median ± half the interquartile range of passes back to back")
    if any(unclear(row["speedup_ci95"]) for row in rows):
        print_line("within noise: the rounds do not tell whether it is faster or slower (95 %); --seconds times longer")
    print_line("MACs with attention; efficiency: measured / fewer MACs; MiB: weights, images and the pass at its peak")
    if any(row["kind"] == "bound" for row in rows):
        print_line("(bound): no model to use; the same token counts, taken for free: no choice of tokens is faster")


def _bench_speed(row: dict[str, Any]) -> list[str]:
    half_spread = (row["latency_ms_p75"] - row["latency_ms_p25"]) / 2
    over = row["overhead_over_bound_pct"]
    return [
        *_bench_name(row),
        number(row["images_per_s"], 1),
        f"{row['latency_ms_p50']:.2f} ±{half_spread:.2f}",
        f"{row['macs_ratio']:.2f} x",
        speedup_text(row),
        "" if over is None else f"{over:+.1f} %" + (", noise" if over < 0 else ""),
    ]


def _bench_more(row: dict[str, Any]) -> list[str]:
    alone = (row["single_pass_ms_p50"], row["single_pass_ms_p90"], row["single_pass_ms_p99"])
    memory, macs = number(row["peak_memory_mib"], 0), number(row["gmacs"], 3)
    return [*_bench_name(row), *map(number, alone), memory, macs, f"{100 * row['efficiency']:.0f} %"]


def _bench_name(row: dict[str, Any]) -> list[str]:
    return ["(bound)" if row["kind"] == "bound" else row["label"], str(row["batch_size"])]


def print_sweep(result: dict[str, Any], folder: Path) -> None:
    """Print what sweep.json says."""
    from vitprune.report.sweep_page import judged_by

    rows = result["rows"]
    size = rows[0]["speed"][-1]["batch_size"]
    judged = judged_by(result)
    accuracy = [judged.figure.short, "change", "95 %"] if judged.change else [judged.figure.short]
    columns = ["", *accuracy, "GMACs", "img/s", "speed", "front"]
    print_table(f"{result['model']}, images/s at batch {size}", columns, [_sweep_cells(row, judged) for row in rows])
    for sentence in result["verdict"]:
        print_line(sentence)
    print_line(
        f"{rows[0]['num_images']} images, the same for all; {result['device']}, {result['precision']}; "
        "front: no other model is as accurate and as fast"
    )
    if judged.change is None:
        print_line(f"{judged.figure.short}: {judged.figure.text}; {judged.why}")
    if judged.takes_others and all(row["kind"] != "other" for row in rows):
        print_line("--also NAME shows whether a smaller dense model is the better choice")
    print_line(f"in {result['seconds']:.0f} s, written to {folder}; to read: {folder / 'sweep.html'}")


def _sweep_cells(row: Mapping[str, Any], judged: Judged) -> list[str]:
    from vitprune.report.sweep_page import accuracy_cells

    change = row["delta"]["speedup"][-1]
    return [
        row["label"],
        *accuracy_cells(row, judged),
        number(row["gmacs"], 3),
        number(row["speed"][-1]["images_per_s"], 1),
        speedup_text(change),
        "yes" if row["by_throughput"]["on_front"] else "no",
    ]
