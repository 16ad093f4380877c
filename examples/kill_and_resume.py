"""Kill a run at random moments, resume it each time, and compare the result with a run that was left alone.

    python examples/kill_and_resume.py demo --kills 3
    python examples/kill_and_resume.py deit_tiny -- --checkpoint deit_tiny.safetensors --data path/to/images

What follows `--` goes to `vitprune sparsify` as it is. On the CPU the weights must be the same bit for bit.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for vitprune sparsify")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints")
    parser.add_argument("--output", type=Path, default=Path("runs/killed"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    mine, options = sys.argv[1:], []
    if "--" in mine:
        mine, options = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    args = parser.parse_args(mine)
    command = [sys.executable, "-m", "vitprune", "sparsify", args.model, "--device", "cpu", *options]
    command += ["--checkpoint-every", str(args.every)]
    whole, cut = args.output / "whole", args.output / "cut"
    starting, duration = leave_alone([*command, "-o", str(whole)], whole / "log.jsonl")
    print(f"left alone: {duration:.0f} s, the first step after {starting:.0f} s", flush=True)
    moments = random.Random(args.seed)
    killed = 0
    while killed < args.kills:
        resume = ["--resume"] if cut.exists() else []
        process = subprocess.Popen(
            [*command, "-o", str(cut), *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        # From starting up to well into training, so that with many kills all of a run is hit.
        time.sleep(moments.uniform(0, starting + 2 * (duration - starting) / args.kills))
        if process.poll() is not None:
            _, err = process.communicate()
            print(f"ended by itself after {killed} kills, exit code {process.returncode}: {err.splitlines()[-1:]}")
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        done = len((cut / "log.jsonl").read_text().splitlines()) if (cut / "log.jsonl").exists() else 0
        print(f"kill {killed} after {done} steps", flush=True)
    if not (cut / "report.json").exists():
        resume = ["--resume"] if cut.exists() else []
        subprocess.run([*command, "-o", str(cut), *resume], check=True, stdout=subprocess.DEVNULL)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    left = sorted(path.name for path in cut.iterdir())
    print(f"{killed} kills; weights {'identical' if same else 'DIFFERENT'}; left in the folder: {', '.join(left)}")
    return 0 if same else 1


def leave_alone(command: list[str], log: Path) -> tuple[float, float]:
    """A whole run: seconds until its first step, and until its end."""
    started, first = time.monotonic(), None
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if first is None and log.exists() and log.stat().st_size:
            first = time.monotonic() - started
        time.sleep(0.1)
    if process.returncode or first is None:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return first, time.monotonic() - started


if __name__ == "__main__":
    raise SystemExit(main())
