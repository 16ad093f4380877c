"""Inject faults into real runs and print what happened: a Markdown table.

    python examples/faults.py demo
    python examples/faults.py deit_tiny --data path/to/imagenet -- --checkpoint deit_tiny.safetensors

DATA is a folder with train/ and val/. What follows `--` says where MODEL's weights are and goes to `vitprune sparsify`
and `vitprune eval`. The full disk is a small tmpfs, so that row needs root; it is skipped aloud otherwise.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

LOG = "log.jsonl"
STEPS = ["--limit", "64", "--pretraining-steps", "4", "--steps"]
MORE = ["-b", "8", "--checkpoint-every", "2", "--bench-seconds", "0.1"]
SHORT, LONG = [*STEPS, "12", *MORE], [*STEPS, "4000", *MORE]
SIGNALS = {
    "Ctrl-C": ([signal.SIGINT], LOG),
    "Ctrl-C twice": ([signal.SIGINT] * 2, LOG),
    "Ctrl-C after training": ([signal.SIGINT], "model.safetensors"),
    "SIGTERM": ([signal.SIGTERM], LOG),
    "SIGHUP": ([signal.SIGHUP], LOG),
}
"""What is sent to all processes of a run that reads with two, once it has written that file."""
STREAMS = {
    "stdout is closed": ">&-",
    "stderr is closed": "2>&-",
    "stdout is full": ">/dev/full",
    "the reader of stdout leaves": "| true",
    "the reader of stderr leaves": "2> >(head -n 1 >/dev/null)",
}
"""As a shell redirects a run."""
OTHERS = {
    "resumed with another plan": ["--resume", "--keep", "0.6"],
    "resumed with other images": ["--resume", "--limit", "32"],
    "resumed with another recipe": ["--resume", "--set", "lr=0.1"],
    "resumed as another process runs": ["--resume"],
    "overwritten as another process runs": ["--overwrite"],
}
"""What is asked of the folder of a run that was stopped, or still runs."""


@dataclass
class Bench:
    """What every fault starts from.

    Attributes:
        model: as for vitprune.
        options: where its weights are.
        data: a folder of 64 training and 64 validation images, to be damaged.
        folder: for runs.
    """

    model: str
    options: list[str]
    data: Path
    folder: Path

    def sparsify(self, *more: str, workers: int = 0, length: list[str] = SHORT) -> list[str]:
        """The command of a short run."""
        begin = ["sparsify", self.model, *self.options, "--data", str(self.data), "--device", "cpu", *length]
        return [*begin, "-j", str(workers), *more]

    def eval(self, *more: str) -> list[str]:
        """The command of an evaluation."""
        return ["eval", self.model, str(self.data), *self.options, "--device", "cpu", "-j", "0", *more]


def vitprune(arguments: list[str], prefix: tuple[str, ...] = ()) -> str:
    """Run a command; its exit code and its error, or the last line it printed."""
    command = [sys.executable, *prefix, "-m", "vitprune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return outcome(done.returncode, done.stdout, done.stderr)


def outcome(code: int, out: str, err: str) -> str:
    """One line of what a command said."""
    if "Traceback" in err and "torch.distributed" not in err:
        return f"exit {code}, A TRACEBACK: {err.splitlines()[-1]}"
    lines = [line for line in err.splitlines() if line.startswith("error:")] if code else []
    words = [line for key in ("unreadable", "top-1") for line in out.splitlines() if key in line]
    return f"exit {code}: {(lines or words or err.splitlines()[-1:])[0].strip()}"


def begun(
    bench: Bench,
    output: Path,
    workers: int = 0,
    launcher: tuple[str, ...] = (),
    length: list[str] = LONG,
    until: str = LOG,
) -> subprocess.Popen[str]:
    """A run that has taken a few steps or, if `until` is another file, has written that."""
    command = [sys.executable, *launcher, "-m", "vitprune"]
    command += bench.sparsify("-o", str(output), workers=workers, length=length)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],  # no nohup
    )
    file = output / until
    while process.poll() is None and not (file.exists() and (until != LOG or len(file.read_text().splitlines()) > 4)):
        time.sleep(0.05)
    return process


def ended(process: subprocess.Popen[str]) -> str:
    """What a run said in the end."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "it DID NOT end"
    return outcome(process.returncode, out, err)


def resumed(bench: Bench, output: Path) -> str:
    """Whether the run goes on from its last checkpoint: it must, to be told its number of steps."""
    before, log = len(list((output / "checkpoints").glob("*"))), output / LOG
    last = json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else 0
    command = [sys.executable, "-m", "vitprune", *bench.sparsify("-o", str(output), "--resume", length=LONG)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = 0
    while process.poll() is None and lines <= last:
        time.sleep(0.1)
        lines = len(log.read_text().splitlines()) if log.exists() else 0
    process.kill()
    process.wait()
    return f"{before} checkpoints there, --resume goes on" if lines > last else "--resume DID NOT go on"


def a_truncated_image(bench: Bench) -> str:
    """Half of a file, in both parts."""
    for part in ("train", "val"):
        path = sorted((bench.data / part).glob("*/*"))[0]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told = {"eval": bench.eval(), "eval --skip-unreadable": bench.eval("--skip-unreadable")}
    told["sparsify"] = bench.sparsify("-o", str(bench.folder / "run"))
    return "; ".join(f"{name}: {vitprune(command)}" for name, command in told.items())


def a_third_of_the_images_is_noise(bench: Bench) -> str:
    """Far more than may be skipped."""
    for path in sorted((bench.data / "train").glob("*/*"))[::3]:
        path.write_bytes(os.urandom(2000))
    return vitprune(bench.sparsify("-o", str(bench.folder / "run")))


def a_damaged_model(bench: Bench, damage: Callable[[Path], None]) -> str:
    """The sparse model, cut off or with a weight that is none."""
    vitprune(bench.sparsify("-o", str(bench.folder / "run")))
    path = bench.folder / "run" / "model.safetensors"
    damage(path)
    return vitprune(["eval", str(path), str(bench.data), "--device", "cpu"])


def cut(path: Path) -> None:
    """The last 100 bytes of a file."""
    path.write_bytes(path.read_bytes()[:-100])


def with_nan(path: Path) -> None:
    """One weight."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path, header)


def a_cut_training_checkpoint(bench: Bench) -> str:
    """The last checkpoint of a killed run, half-written."""
    run = bench.folder / "run"
    process = begun(bench, run)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    cut(sorted((run / "checkpoints").glob("*.safetensors"))[-1])
    return resumed(bench, run)


def a_full_disk(bench: Bench) -> str:
    """A tmpfs that holds the model and the first checkpoint, but no second one."""
    if os.geteuid():
        return "skipped: only root may mount a tmpfs"
    vitprune(bench.sparsify("-o", str(bench.folder / "probe")))
    size = (bench.folder / "probe" / "model.safetensors").stat().st_size
    disk = bench.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(5.5 * size)}", "tmpfs", str(disk)], check=True)
    try:
        told = vitprune(bench.sparsify("-o", str(disk / "run")))
        saved = len(list((disk / "run" / "checkpoints").glob("step-*.safetensors")))
        left = [path.name for path in disk.rglob("*") if path.name.endswith(".tmp")]
        return f"{told}; {saved} checkpoint(s) whole, {len(left)} half-written"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def signalled(bench: Bench, sent: list[signal.Signals], until: str) -> str:
    """Signals to the whole process group, as terminals and schedulers send them."""
    run = bench.folder / "run"
    process = begun(bench, run, workers=2, length=LONG if until == LOG else SHORT, until=until)
    for number in sent:
        os.killpg(process.pid, number)
        time.sleep(0.1)
    told = ended(process)
    if until != LOG:
        return f"{told}; then {vitprune(bench.sparsify('-o', str(run), '--resume'))}"
    return f"{told}; {resumed(bench, run)}"


def redirected(bench: Bench, where: str) -> str:
    """A run whose words go nowhere."""
    run = bench.folder / "run"
    command = [sys.executable, "-m", "vitprune", *bench.sparsify("-o", str(run))]
    shell = ["bash", "-c", f"set -o pipefail; {shlex.join(command)} {where}"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    written = "the report is written" if (run / "report.json").is_file() else "the run DID NOT end well"
    return f"{outcome(done.returncode, done.stdout, done.stderr or '(no word)')}; {written}"


def in_the_folder_of_another(bench: Bench, options: list[str], *, runs: bool) -> str:
    """Options that go with the run there, or do not."""
    run = bench.folder / "run"
    process = begun(bench, run)
    if not runs:
        process.terminate()
        process.communicate()
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "best.ckpt").write_bytes(b"of the user")
    told = vitprune(bench.sparsify("-o", str(run), *options, length=LONG))
    process.kill()
    process.communicate()
    kept = "a file of the user stays" if (run / "checkpoints" / "best.ckpt").is_file() else "DID NOT keep a file"
    return f"{told}; {kept}"


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(child) for child in found.stdout.split()]


def a_dead_worker(bench: Bench) -> str:
    """Kill -9 for a process that reads images."""
    process = begun(bench, bench.folder / "run", workers=2)
    worker = next(child for child in children(process) if "tracker" not in Path(f"/proc/{child}/cmdline").read_text())
    os.kill(worker, signal.SIGKILL)
    return ended(process)


def a_dead_process_of_two(bench: Bench) -> str:
    """Kill -9 for one of two that train together."""
    run = bench.folder / "run"
    process = begun(bench, run, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    os.kill(children(process)[-1], signal.SIGKILL)
    process.communicate(timeout=120)
    return f"torchrun ends the other, exit {process.returncode}; {resumed(bench, run)}"


def a_missing_shard(bench: Bench) -> str:
    """Of three tar shards one is not there; then one is cut off."""
    images = sorted((bench.data / "val").glob("*/*"))
    classes = class_index(bench)
    for number in (0, 2):
        with tarfile.open(bench.folder / f"val-{number:05d}-of-00003.tar", "w") as tar:
            for index, path in enumerate(images[number::3]):
                parts = {path.suffix: path.read_bytes(), ".cls": str(classes[path.parent.name]).encode()}
                for suffix, content in parts.items():
                    entry = tarfile.TarInfo(f"{index:05d}{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    command = ["eval", bench.model, *bench.options, str(bench.folder / "val-*.tar"), "--device", "cpu", "-j", "0"]
    done = subprocess.run([sys.executable, "-m", "vitprune", *command], capture_output=True, text=True, check=False)
    note = next((line for line in done.stderr.splitlines() if "missing" in line), "NOT A WORD")
    path = bench.folder / "val-00002-of-00003.tar"
    path.write_bytes(path.read_bytes()[:-2000])
    return f"exit {done.returncode}: {note}; cut off: {vitprune(command)}"


def class_index(bench: Bench) -> dict[str, int]:
    """The model's number of each class: tar shards number them."""
    from vitprune.data import ModelClasses
    from vitprune.data.classes import match_classes
    from vitprune.loading.load import load_model

    loaded = load_model(bench.model, weights="none")
    names = sorted({path.name for path in bench.data.glob("val/*")})
    return match_classes(names, ModelClasses(loaded.model.num_classes, loaded.class_names), "data").index


FAULTS: dict[str, Callable[[Bench], str]] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        a_truncated_image,
        a_third_of_the_images_is_noise,
        a_cut_training_checkpoint,
        a_full_disk,
        a_dead_worker,
        a_dead_process_of_two,
        a_missing_shard,
    )
}
FAULTS |= {f"a model {cause.__name__}": partial(a_damaged_model, damage=cause) for cause in (cut, with_nan)}
FAULTS |= {name: partial(signalled, sent=sent, until=until) for name, (sent, until) in SIGNALS.items()}
FAULTS |= {name: partial(redirected, where=where) for name, where in STREAMS.items()}
FAULTS |= {
    name: partial(in_the_folder_of_another, options=options, runs="process" in name) for name, options in OTHERS.items()
}


def some_images(data: Path | None, folder: Path, count: int = 64) -> Path:
    """A few images of DATA or of the demo set as files that may be damaged."""
    from vitprune.data.demo import CLASS_NAMES, demo_images

    for part in ("train", "val"):
        if data is None:
            drawn = demo_images(part)  # type: ignore[arg-type, unused-ignore]
            for index in range(count):
                target = folder / part / CLASS_NAMES[drawn.labels[index]] / f"{index}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                drawn.read(index).save(target)
            continue
        found = sorted((data / part).glob("*/*"))
        for path in found[:: max(1, len(found) // count)][:count]:
            target = folder / part / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for vitprune sparsify")
    parser.add_argument("--data", type=Path, help="a folder with train/ and val/; the demo set if left out")
    parser.add_argument("--only", help=f"some of: {', '.join(FAULTS)}")
    mine, options = sys.argv[1:], []
    if "--" in mine:
        mine, options = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    args = parser.parse_args(mine)
    chosen = args.only.split(",") if args.only else list(FAULTS)
    if unknown := [name for name in chosen if name not in FAULTS]:
        parser.error(f"no fault '{unknown[0]}'")
    print("| fault | what happened |\n|---|---|")
    failed = False
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            data = some_images(args.data, root / "data")
            told = FAULTS[name](Bench(args.model, options, data, root)).replace(str(root), "...")
        failed = failed or any(word in told for word in ("TRACEBACK", "DID NOT", "NOT A WORD"))
        print(f"| {name} | {told} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
