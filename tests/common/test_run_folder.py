"""Which folder a run gets, and what an earlier run leaves in it."""

import pytest

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
        RunFolder.choose(run.weights, "", overwrite=True)


def test_what_would_be_taken_for_the_next_run_is_forgotten(empty_folder):
    run = RunFolder(empty_folder / "run")
    run.create(needed_bytes=1)
    run.checkpoints.mkdir()
    for path in (run.weights, run.report, run.page, run.log, run.keep_maps, run.checkpoints / ".step-1.tmp"):
        path.write_text("")
    assert run.is_complete
    run.forget()
    run.forget()
    assert [path.name for path in run.path.iterdir()] == ["model.safetensors"]
    assert not run.is_complete
