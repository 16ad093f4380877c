"""Two processes do together what one does alone."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from agreement import assert_trained_alike
from safetensors.torch import load_file

from vitprune.cli.app import run as cli

pytestmark = pytest.mark.slow

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(count, *arguments, cwd):
    """A vitprune command in `count` processes: exit code, stdout, stderr. One alone is this one: they start slowly."""
    if count == 1:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            return cli(list(arguments)), out.getvalue(), err.getvalue()
    command = [*LAUNCH, str(count), "-m", "vitprune", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def training(weights_file, image_folder):
    command = f"sparsify test_vit --checkpoint {weights_file} --data {image_folder} --device cpu --precision fp32 -b 4"
    return f"{command} -j 0 --pretraining-steps 6 --steps 14 --bench-seconds 0.1 --json".split()


def test_losses_of_two_processes_are_those_of_one_also_in_two_microbatches_each(training, tmp_path):
    logs, tensors = [], []
    for count, options in ((1, []), (2, []), (2, ["--grad-accum-steps", "2"])):
        code, out, err = run(count, *training, *options, "-o", "run", "--overwrite", cwd=tmp_path)
        assert code == 0, err
        report = json.loads(out)
        assert report["sparse"]["num_images"] == 6
        assert report["training"]["num_images"] == 80
        lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
        tensors.append(load_file(tmp_path / "run" / "model.safetensors"))
    assert [len(log) for log in logs] == [20, 20, 20]
    for one, *others in zip(*logs, strict=True):
        for other in others:
            assert one["phase"] == other["phase"]
            assert other["total"] == pytest.approx(one["total"], abs=1e-4)
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert_trained_alike([other[name] for name in tensors[0]], tensors[0].values())


def test_what_any_process_cannot_read_is_counted(training, image_folder, tmp_path):
    (image_folder / "train" / "dog" / "5.png").write_bytes(b"no image")
    code, out, err = run(2, *training, "-o", "run", cwd=tmp_path)
    assert code == 0, err
    # 20 steps of 4 images out of 12 are six passes and two thirds; each pass meets it once, in either process.
    assert json.loads(out)["training"]["num_unreadable"] in (6, 7)


def test_every_image_counts_once_in_eval(weights_file, image_folder, tmp_path):
    """Also where the last process has fewer."""
    command = f"eval test_vit {image_folder} --checkpoint {weights_file} --device cpu -j 0 --limit 5 --json".split()
    results = []
    for count in (1, 3):
        code, out, err = run(count, *command, cwd=tmp_path)
        assert code == 0, err
        result = json.loads(out)
        results.append((result["num_images"], result["top1_pct"], result["classes"]))
    assert results[0][0] == 5
    assert results[0] == results[1]


def test_a_batch_that_cannot_be_shared_is_refused(training, tmp_path):
    code, _, err = run(2, *training, "-b", "5", "-o", "run", cwd=tmp_path)
    assert code != 0
    assert "a batch of 5 images cannot be shared by 2 processes" in err
