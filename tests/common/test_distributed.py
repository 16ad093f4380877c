"""Two processes do together what one does alone."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from agreement import assert_trained_alike
from safetensors.torch import load_file, save_file

from vitprune.cli.app import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
IN_TURN = """import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from vitprune.cli.app import run
from vitprune.common import distributed

finish, distributed.finish = distributed.finish, lambda: None  # the next command needs the others, too
told = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(command)
    told.append((code, out.getvalue(), err.getvalue()))
Path("told" + os.environ["RANK"] + ".json").write_text(json.dumps(told))
finish()
"""


def launch(*program, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*LAUNCH, *program], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def alone(*arguments):
    """What a command prints that runs in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert run(list(arguments)) == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(make_vit, make_image_folder, tmp_path_factory):
    """Weights, images, and images of which one cannot be read."""
    folder = tmp_path_factory.mktemp("distributed")
    save_file(make_vit(num_classes=2).state_dict(), folder / "weights.safetensors")
    make_image_folder(folder / "images")
    (make_image_folder(folder / "spoilt") / "train" / "dog" / "5.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def training(folder):
    command = f"sparsify test_vit --checkpoint {folder / 'weights.safetensors'} --device cpu --precision fp32 -b 4"
    return f"{command} -j 0 --pretraining-steps 6 --steps 14 --bench-seconds 0.1 --json".split()


@pytest.fixture(scope="module")
def together(folder, training):
    """By name: exit code, stdout and stderr of commands in two processes, one after the other as these start slowly."""
    whole = [*training, "--data", str(folder / "images")]
    commands = {
        "whole": [*whole, "-o", "whole"],
        "in microbatches": [*whole, "--grad-accum-steps", "2", "-o", "microbatches"],
        "unreadable": [*training, "--data", str(folder / "spoilt"), "-o", "unreadable"],
        "odd batch": [*whole, "-b", "5", "-o", "odd"],
    }
    (folder / "in_turn.py").write_text(IN_TURN)
    done = launch("in_turn.py", json.dumps([*commands.values()]), cwd=folder)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((folder / f"told{rank}.json").read_text()) for rank in (0, 1))
    assert [out for _, out, _ in second] == [""] * len(commands), "one process speaks"
    return dict(zip(commands, first, strict=True))


def test_losses_of_two_processes_are_those_of_one_also_in_two_microbatches_each(together, folder, training):
    logs, tensors = [], []
    one = alone(*training, "--data", str(folder / "images"), "-o", str(folder / "alone"))
    for name, out in (("alone", one), *((key, together[key][1]) for key in ("whole", "in microbatches"))):
        report = json.loads(out)
        assert report["sparse"]["num_images"] == 6
        assert report["training"]["num_images"] == 80
        place = folder / name.removeprefix("in ")
        logs.append([json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()])
        tensors.append(load_file(place / "model.safetensors"))
    assert [len(log) for log in logs] == [20, 20, 20]
    for one, *others in zip(*logs, strict=True):
        for other in others:
            assert one["phase"] == other["phase"]
            assert other["total"] == pytest.approx(one["total"], abs=1e-4)
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert_trained_alike([other[name] for name in tensors[0]], tensors[0].values())


def test_what_any_process_cannot_read_is_counted(together):
    code, out, err = together["unreadable"]
    assert code == 0, err
    # 20 steps of 4 images out of 12 are six passes and two thirds; each pass meets it once, in either process.
    assert json.loads(out)["training"]["num_unreadable"] in (6, 7)


def test_a_batch_that_cannot_be_shared_is_refused(together):
    code, _, err = together["odd batch"]
    assert code == 2
    assert "a batch of 5 images cannot be shared by 2 processes" in err


def test_every_image_counts_once_in_eval(folder):
    """Also where the last process has fewer; as a command of its own."""
    weights = str(folder / "weights.safetensors")
    command = ["eval", "test_vit", str(folder / "images"), "--checkpoint", weights, "--limit", "5", "--json"]
    command += ["--device", "cpu", "-j", "0"]
    done = launch("-m", "vitprune", *command, cwd=folder)
    assert done.returncode == 0, done.stderr
    one, several = json.loads(alone(*command)), json.loads(done.stdout)
    assert one["num_images"] == 5
    for key in ("num_images", "top1_pct", "classes"):
        assert several[key] == one[key]
