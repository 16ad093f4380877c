"""push: against a stand-in of the Hub's API that records commits, errors of the real one, and no network."""

import io
import json
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from finished_run import write_run, write_whole_run
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import vitprune
from vitprune.cli.app import run
from vitprune.jobs.push import look_up, prepare, upload
from vitprune.loading.load import load_model

OURS = ["README.md", "config.json", "model.safetensors", "report.html", "report.json"]
PICTURE = b"data:image/jpeg"


@pytest.fixture(scope="module")
def sparse(make_sparse):
    return make_sparse(num_classes=2)


@pytest.fixture
def folder(sparse, tmp_path):
    origin = {"source": "timm/test_vit.r160_in1k", "license": "apache-2.0"}
    return write_whole_run(tmp_path / "run", sparse, origin, steps=False)  # whose charts take most of the time


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of HfApi: `made` and `commits` tell what it was asked, `files` is what the repository holds."""
    state = SimpleNamespace(made=[], commits=[], found=None, files=tmp_path / "repository")

    class Api:
        endpoint = "https://hub.example"

        def whoami(self):
            return {"name": "me"}

        def model_info(self, repository, timeout):
            if state.found is None:
                error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
                Exception.__init__(error, "no")
                raise error
            return state.found

        def create_repo(self, repository, *, private, repo_type):
            state.made.append((repository, private, repo_type))

        def create_commit(self, repository, operations, **options):
            state.commits.append((repository, options))
            state.files.mkdir()
            for operation in operations:
                with operation.as_file() as file:
                    (state.files / operation.path_in_repo).write_bytes(file.read())
            return SimpleNamespace(commit_url=f"{self.endpoint}/{repository}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return state


def existing(private, *names):
    return SimpleNamespace(private=private, sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])


def answer(monkeypatch, text):
    """A terminal at which `text` is typed."""
    terminal = io.StringIO(text)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_commit_brings_all_files_and_no_path_of_this_machine(folder, hub, tmp_path, capsys):
    before = content(folder)
    assert run(["push", str(folder), "me/mine", "--yes", "--json"]) == 0
    out, err = capsys.readouterr()
    assert hub.made == [("me/mine", False, "model")]
    ((repository, options),) = hub.commits
    assert (repository, options["parent_commit"]) == ("me/mine", None)
    assert "keep 0.7" in options["commit_message"]
    there = content(hub.files)
    assert sorted(there) == OURS
    result = json.loads(out)
    assert {row["name"]: row["size_mib"] for row in result["files"]} == {
        name: len(there[name]) / 2**20 for name in there
    }
    assert (result["private"], result["created"], result["num_images"]) == (False, True, 2)
    assert result["commit_url"] == "https://hub.example/me/mine/commit/1"
    assert "PUBLIC" in err
    assert "report.html shows 2 images of your data set" in err
    assert "uploaded to" not in out
    assert content(folder) == before, "the run folder is not touched"
    for name, text in there.items():
        assert b"/home/somebody" not in text, name
        assert str(tmp_path).encode() not in text, name
    assert there["model.safetensors"] == before["model.safetensors"]
    config = json.loads(there["config.json"])
    assert config == json.loads(before["config.json"]) | {"accuracy": config["accuracy"]}
    assert PICTURE in there["report.html"]
    card = ModelCard(there["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("timm/test_vit.r160_in1k", "vitprune")
    assert "OWNER/NAME" not in card.text


@pytest.fixture
def pushed(folder, hub, monkeypatch):
    """The files of me/mine, a repository that can be downloaded from."""
    upload(prepare(folder, "me/mine"), look_up("me/mine", private=False))
    monkeypatch.setattr("vitprune.loading.hub.check_hub", lambda *arguments: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name, revision=None: hub.files / name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **options: str(hub.files))
    return hub.files


@pytest.mark.slow
def test_what_was_pushed_is_compared(pushed, image_folder, weights_file, monkeypatch, capsys):
    monkeypatch.setattr("vitprune.jobs.compare._BENCH_SECONDS", 0.01)
    compare = ["compare", "hf-hub:me/mine", str(image_folder), "--methods", "ours", "--device", "cpu", "-j", "0"]
    assert run([*compare, "--keep", "0.5"]) == 2
    assert "has its own plan" in capsys.readouterr().err
    assert run([*compare, "--checkpoint", str(weights_file), "--json"]) == 0
    (ours,) = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["method"] == "ours"]
    assert not ours["train_seconds"], "it is trained already"


def test_what_was_pushed_is_a_model(pushed, sparse, make_images, image_folder, capsys):
    images = make_images(sparse)
    with torch.no_grad():
        expected = sparse(images)
        assert torch.equal(load_model("hf-hub:me/mine").sparse(images), expected)
        assert torch.equal(vitprune.load("hf-hub:me/mine@main")(images), expected)
    assert run(["eval", "hf-hub:me/mine", str(image_folder), "--device", "cpu", "-j", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == 0.7

    # The card's own lines, as a reader would copy them.
    (block,) = [part.split("```")[0] for part in (pushed / "README.md").read_text().split("```python\n")[1:]]
    image = next((image_folder / "val").rglob("*.png"))
    names = {}
    exec(block.replace("image.jpg", str(image)), names)
    assert names["probabilities"].shape == (1, 2)
    assert names["probabilities"].sum().item() == pytest.approx(1)


def test_images_can_be_left_out(folder, hub, capsys):
    hub.found = existing(True, "report.html", "notes.txt")
    assert run(["push", str(folder), "me/mine", "--no-images", "-y"]) == 0
    out, err = capsys.readouterr()
    assert PICTURE not in (hub.files / "report.html").read_bytes()
    assert "report.html shows" not in err
    assert "remains in the history" in err
    assert "uploaded to https://hub.example/me/mine" in out
    assert hub.made == []
    assert hub.commits[0][1]["parent_commit"] == "abc", "if somebody commits meanwhile, ours must not go through"


def test_it_asks_and_shows_what_it_asks_about(folder, hub, monkeypatch, capsys):
    hub.found = existing(False, "README.md")
    answer(monkeypatch, "y\n")
    assert run(["push", str(folder), "me/mine"]) == 0
    err = capsys.readouterr().err
    assert "exists, PUBLIC: everybody can see it), as me" in err
    assert "README.md: " in err
    assert err.count("replaces the one there") == 1
    assert "Upload? [y/N]" in err
    assert len(hub.commits) == 1


def test_no_is_the_default_and_uploads_nothing(folder, hub, monkeypatch, capsys):
    for text in ("\n", "n\n", "no\n", ""):
        answer(monkeypatch, text)
        assert run(["push", str(folder), "me/mine"]) == (1 if text else 130)
        assert not text or "upload cancelled" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run(["push", str(folder), "me/mine"]) == 2
    assert "there is no terminal to answer on" in capsys.readouterr().err
    assert (hub.made, hub.commits) == ([], [])


def test_private_is_made_private_and_never_a_public_one(folder, hub, capsys):
    assert run(["push", str(folder), "me/mine", "--private", "--yes"]) == 0
    assert hub.made == [("me/mine", True, "model")]
    hub.found = existing(False)
    assert run(["push", str(folder), "me/mine", "--private", "--yes"]) == 2
    assert "exists and is public" in capsys.readouterr().err
    assert len(hub.commits) == 1


def test_a_card_that_exists_goes_as_it_is(folder, hub):
    (folder / "README.md").write_bytes(b"# Mine, at hf-hub:OWNER/NAME \xff\n")
    assert run(["push", str(folder), "me/mine", "--yes"]) == 0
    assert (hub.files / "README.md").read_bytes() == b"# Mine, at hf-hub:me/mine \xff\n"


def test_names_that_cannot_be(folder, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # any use of it is an error
    for name in ("mine", "a/b/c", "me/", "me/mi ne", "me/mine.git", "../mine", "hf-hub:me/mine"):
        assert run(["push", str(folder), name, "--yes"]) == 2
        err = capsys.readouterr().err
        assert f"'{name}' is an invalid repository name" in err
        assert "OWNER/NAME" in err


def test_folders_that_are_no_complete_run(folder, sparse, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)

    def refused(code, message):
        assert run(["push", str(folder), "me/mine", "--yes"]) == code
        assert message in capsys.readouterr().err

    write_run(folder, label="keep 0.9")
    refused(1, "is not of the model.safetensors beside it")
    (folder / "report.json").rename(tmp_path / "report.json")
    refused(2, "holds no report.json, so it is no complete run")
    (tmp_path / "report.json").rename(folder / "report.json")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(1, "is damaged")
    weights.unlink()
    refused(2, "holds no model.safetensors")
    write_whole_run(folder, sparse, {"source": "/home/somebody/net.pth"})
    refused(1, "names a folder of this machine")
    assert run(["push", str(tmp_path / "absent"), "me/mine", "--yes"]) == 2


def test_without_a_network_or_a_token(folder, monkeypatch, capsys):
    """The real HfApi, at an address of this machine where nobody listens."""

    def said(offline=False, token="hf_madeup"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: token)
        assert run(["push", str(folder), "me/mine", "--yes"]) == 1
        return capsys.readouterr().err

    assert said().startswith("error: the Hugging Face Hub is out of reach (")
    assert "HF_HUB_OFFLINE is set" in said(offline=True)
    assert "there is no token of the Hugging Face Hub on this machine" in said(token=None)
    assert "hf auth login" in said(token=None)


def test_what_the_hub_refuses_is_said_in_one_sentence(folder, hub, monkeypatch, capsys):
    for error, message in (
        (401, "the Hugging Face Hub does not accept the token"),
        (403, "the token may not write to 'me/mine' (no quota)"),
        (404, "the token may not write to 'me/mine' (no quota)"),
        (412, "the Hugging Face Hub refused it: no quota"),
        (ValueError("Invalid metadata in README.md.\n- no licence"), "refused it: Invalid metadata in README.md. - no"),
    ):
        if isinstance(error, int):
            response = SimpleNamespace(status_code=error, headers={}, request=None)
            error = HfHubHTTPError("no", response=response, server_message="no quota")
        monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", Mock(side_effect=error))
        assert run(["push", str(folder), "me/mine", "--yes"]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in line
