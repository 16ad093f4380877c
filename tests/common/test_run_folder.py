"""Which folder a run gets, who else may write there, and what an earlier run leaves in it."""

import errno
import subprocess
import sys

import pytest

from vitprune.common.files import write_text
from vitprune.common.run_folder import RunFolder
from vitprune.errors import OutputError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_folders_are_numbered_and_the_last_one_is_resumed():
    with pytest.raises(OutputError, match=r"no run to resume in 'runs/deit-keep0\.7'"):
        RunFolder.choose(None, "deit-keep0.7", resume=True)
    for name in ("deit-keep0.7", "deit-keep0.7-2", "deit-keep0.7-3"):
        run = RunFolder.choose(None, "deit-keep0.7")
        assert run.path.name == name
        run.create(needed_bytes=1)
        assert RunFolder.choose(None, "deit-keep0.7", resume=True).path.name == name
    run.report.write_text("{}")
    with pytest.raises(OutputError, match=r"the run in 'runs/deit-keep0\.7-3' is complete"):
        RunFolder.choose(None, "deit-keep0.7", resume=True)


def test_existing_output_needs_overwrite(empty_folder):
    run = RunFolder(empty_folder / "run")
    with pytest.raises(OutputError, match="no run to resume"):
        RunFolder.choose(run.path, "", resume=True)
    run.create(needed_bytes=1)
    assert RunFolder.choose(run.path, "").path == run.path, "an empty folder is free"
    run.weights.write_text("")
    assert RunFolder.weights_in(run.path) == RunFolder.weights_in(run.weights) == run.weights
    with pytest.raises(OutputError, match="exists") as caught:
        RunFolder.choose(run.path, "")
    assert "--overwrite" in caught.value.hint
    assert RunFolder.choose(run.path, "", overwrite=True).path == run.path
    assert RunFolder.choose(run.path, "", resume=True).path == run.path
    with pytest.raises(OutputError, match="is a file"):
        RunFolder.choose(run.path / "model.safetensors", "", overwrite=True)


_ANOTHER = """import sys, time
from pathlib import Path
from vitprune.common.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).claimed(1):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_do_not_share_a_folder_and_a_killed_one_does_not_block(empty_folder):
    run = RunFolder(empty_folder / "run")
    another = subprocess.Popen([sys.executable, "-c", _ANOTHER, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert another.stdout.readline() == "held\n"
    for chosen in (RunFolder(run.path), RunFolder.choose(run.path, "", overwrite=True)):
        with pytest.raises(OutputError, match=f"another run .process {another.pid}. is writing to") as caught:
            chosen.claimed(1).__enter__()
        assert caught.value.exit_code == 2
    another.kill()
    another.communicate()
    assert (run.path / ".lock").exists()
    with RunFolder.choose(run.path, "").claimed(1):
        run.log.write_text("")
    assert [path.name for path in run.path.iterdir()] == ["log.jsonl"]


def test_making_the_folder_is_the_choice_of_its_name():
    first, second = (RunFolder.choose(None, "deit-keep0.7") for _ in range(2))
    with first.claimed(1), second.claimed(1):
        assert (first.path.name, second.path.name) == ("deit-keep0.7", "deit-keep0.7-2")
        assert second.weights == second.path / "model.safetensors"
        second.log.write_text("")
    assert not first.path.exists(), "nothing was written there"
    assert second.path.exists()


def test_what_another_run_has_written_since_is_not_replaced(empty_folder):
    chosen = RunFolder.choose(empty_folder / "run", "")
    with RunFolder(empty_folder / "run").claimed(1) as other:
        other.report.write_text('{"environment": {"vitprune": "1"}}')
    with pytest.raises(OutputError, match="exists"):
        chosen.claimed(1).__enter__()
    assert other.report.is_file()


def test_a_file_system_without_locks_and_modes_is_written_all_the_same(empty_folder, monkeypatch):
    def unsupported(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    monkeypatch.setattr("pathlib.Path.chmod", unsupported)
    with RunFolder(empty_folder / "run").claimed(1) as run:
        write_text(run.log, "a line")
    assert run.log.read_text() == "a line"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "report.json", "report.html", "log.jsonl"])
def test_others_files_of_a_runs_names_are_not_replaced(empty_folder, name):
    run = RunFolder(empty_folder / "mine")
    run.path.mkdir()
    (run.path / name).write_text('{"architectures": ["ViTForImageClassification"]}')
    for more in ({"overwrite": True}, {"resume": True}):
        if (name, more) == ("report.json", {"resume": True}):
            continue  # taken for complete
        with pytest.raises(OutputError, match=f"mine/{name}' is not of vitprune") as caught:
            RunFolder.choose(run.path, "", **more)
        assert caught.value.exit_code == 2
    assert RunFolder.choose(run.path, "", overwrite=True, of_run=False).path == run.path


def test_what_would_be_taken_for_the_next_run_is_forgotten(empty_folder):
    run = RunFolder(empty_folder / "run")
    run.create(needed_bytes=1)
    run.checkpoints.mkdir()
    for path in (
        run.weights,
        run.report,
        run.page,
        run.log,
        run.keep_maps,
        run.checkpoints / ".step-000000001.safetensors.x.tmp",
    ):
        path.write_text("")
    assert run.is_complete
    (run.checkpoints / "best.ckpt").write_text("of the user")
    assert run.forget() == ["best.ckpt"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["best.ckpt"]
    (run.checkpoints / "best.ckpt").unlink()
    assert run.forget() == []
    assert [path.name for path in run.path.iterdir()] == ["model.safetensors"]
    assert not run.is_complete
