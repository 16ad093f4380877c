"""push: against a stand-in of the Hub's API that records commits, a small server that refuses, and no network."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from finished_run import write_run, write_whole_run
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

import vitprune
from vitprune.cli.app import run
from vitprune.jobs.push import push_run
from vitprune.loading.load import load_model

OURS = ["README.md", "config.json", "model.safetensors", "report.html", "report.json"]
FOR_TIMM = "timm_backbone.safetensors"
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 2}
PICTURE = b"data:image/jpeg"


@pytest.fixture(scope="module")
def sparse(make_sparse):
    return make_sparse(num_classes=2)


@pytest.fixture
def folder(sparse, tmp_path):
    return write_whole_run(tmp_path / "run", sparse, {"source": "timm/test_vit.r160_in1k", "license": "apache-2.0"})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of HfApi: `made` and `commits` tell what it was asked, `files` is what the repository holds."""
    state = SimpleNamespace(made=[], commits=[], found=None, role="write", files=tmp_path / "repository")

    class Api:
        endpoint = "https://hub.example"

        def whoami(self):
            return {"name": "me", "auth": {"accessToken": {"displayName": "laptop", "role": state.role}}}

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
    assert sorted(there) == [*OURS, FOR_TIMM]
    result = json.loads(out)
    assert {row["name"]: row["size_bytes"] for row in result["files"]} == {name: len(there[name]) for name in there}
    assert (result["private"], result["created"], result["num_images"]) == (False, True, 2)
    assert result["commit_url"] == "https://hub.example/me/mine/commit/1"
    assert "PUBLIC" in err
    assert "report.html shows 2 images of your data set" in err
    assert content(folder) == before, "the run folder is not touched"
    for name, text in there.items():
        assert b"/home/somebody" not in text, name
        assert str(tmp_path).encode() not in text, name
    assert there["model.safetensors"] == before["model.safetensors"]
    config, ours = json.loads(there["config.json"]), json.loads(before["config.json"])
    assert {name: config[name] for name in ours} == ours | {"accuracy": config["accuracy"]}, "timm's keys beside ours"
    assert f"{FOR_TIMM} is the dense backbone" in err
    assert PICTURE in there["report.html"]
    card = ModelCard(there["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("timm/test_vit.r160_in1k", "timm")
    assert "OWNER/NAME" not in card.text


def test_what_was_pushed_is_a_model_for_every_command(
    folder, hub, sparse, make_images, image_folder, weights_file, monkeypatch, capsys
):
    push_run(folder, "me/mine")
    monkeypatch.setattr("vitprune.loading.hub.check_hub", lambda repository: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name, revision=None: hub.files / name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **options: str(hub.files))
    images = make_images(sparse)
    with torch.no_grad():
        expected = sparse(images)
        assert torch.equal(load_model("hf-hub:me/mine").sparse(images), expected)
        assert torch.equal(vitprune.load("hf-hub:me/mine@main")(images), expected)
    assert run(["eval", "hf-hub:me/mine", str(image_folder), "--device", "cpu", "-j", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == 0.7

    monkeypatch.setattr("vitprune.jobs.compare._BENCH_SECONDS", 0.01)
    compare = ["compare", "hf-hub:me/mine", str(image_folder), "--methods", "ours", "--device", "cpu", "-j", "0"]
    assert run([*compare, "--keep", "0.5"]) == 2
    assert "has its own plan" in capsys.readouterr().err
    assert run([*compare, "--checkpoint", str(weights_file), "--json"]) == 0
    (ours,) = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["method"] == "ours"]
    assert not ours["train_s"], "it is trained already"

    # The card's own lines, as a reader would copy them.
    block, _ = [part.split("```")[0] for part in (hub.files / "README.md").read_text().split("```python\n")[1:]]
    image = next((image_folder / "val").rglob("*.png"))
    names = {}
    exec(block.replace("image.jpg", str(image)), names)
    assert names["probabilities"].shape == (1, 2)
    assert names["probabilities"].sum().item() == pytest.approx(1)


@pytest.fixture
def timm_opens(hub, monkeypatch):
    """`timm_opens(spec, **arguments)`: timm.create_model, to which the Hub is what was committed."""
    asked = []

    def download(repo_id, filename, revision=None, cache_dir=None):
        asked.append((repo_id, filename, revision))
        return str(hub.files / filename)

    def create(spec, **arguments):
        return timm.create_model(spec, pretrained=True, **arguments).eval(), asked

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return create


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_vit", {"num_classes": 2, "img_size": 96, "in_chans": 1}),
        ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "class_token": False, "num_classes": 2}),
        ("deit_tiny_distilled_patch16_224", {**SMALL, "num_classes": 2}),
        ("eva02_tiny_patch14_224", {**SMALL, "img_size": 56, "num_classes": 2}),
    ],
)
def test_timm_opens_the_backbone_of_a_repository(name, arguments, make_sparse, make_images, hub, timm_opens, tmp_path):
    sparse = make_sparse(name, **arguments)
    origin = {"source": "owner/net", "license": "mine", "origin_url": None}
    push_run(write_whole_run(tmp_path / "run", sparse, origin, ("cat", "dog")), "me/mine")
    model, asked = timm_opens("hf-hub:me/mine@v1")
    assert asked == [("me/mine", "config.json", "v1"), ("me/mine", FOR_TIMM, "v1")], "never model.safetensors"
    assert list(model.state_dict()) == list(sparse.model.state_dict())
    images = make_images(sparse)
    with torch.no_grad():
        assert torch.equal(model(images), sparse.model(images))
        assert not torch.equal(model(images), sparse(images)), "it is the dense one"
    told = model.pretrained_cfg
    assert list(told["label_names"]) == ["cat", "dog"]
    assert told["license"] == "mine", "not what timm says of the architecture's default weights"
    assert told.keys().isdisjoint({"tag", "origin_url"})
    config = json.loads((hub.files / "config.json").read_text())
    assert json.loads(json.dumps(timm.data.resolve_model_data_config(model))) == config["preprocessing"]
    changed, _ = timm_opens("hf-hub:me/mine", num_classes=5)
    assert changed.num_classes == 5

    # The card's own lines.
    blocks = [part.split("```")[0] for part in (hub.files / "README.md").read_text().split("```python\n")[1:]]
    names = {}
    exec(blocks[1], names)
    with torch.no_grad():
        assert torch.equal(names["dense"](images), sparse.model(images))


def test_what_timm_cannot_build_has_no_file_for_it(make_sparse, hub, tmp_path, capsys):
    tiny = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 2, "stem_width": 8, "num_classes": 2}
    folder = write_whole_run(tmp_path / "run", make_sparse("lvvit_s", **tiny))
    before = json.loads((folder / "config.json").read_text())
    assert run(["push", str(folder), "me/mine", "--yes", "--json"]) == 0
    out, err = capsys.readouterr()
    assert sorted(content(hub.files)) == OURS == sorted(row["name"] for row in json.loads(out)["files"])
    assert "timm cannot build this architecture" in err
    assert json.loads((hub.files / "config.json").read_text()).keys() == before.keys()
    card = ModelCard((hub.files / "README.md").read_text())
    assert card.data.library_name == "vitprune"
    assert "timm" not in card.data.tags
    assert 'timm.create_model("hf-hub' not in card.text


def test_a_backbone_that_timm_opens_as_something_else_is_not_uploaded(folder, hub, monkeypatch, make_vit, capsys):
    monkeypatch.setattr("vitprune.export.timm_folder.read_timm", lambda folder: make_vit(seed=1, num_classes=2))
    assert run(["push", str(folder), "me/mine", "--yes"]) == 1
    assert "does not compute what the model does" in capsys.readouterr().err
    assert hub.made == []


def test_images_can_be_left_out(folder, hub, capsys):
    hub.found = existing(True, "report.html", "notes.txt")
    assert run(["push", str(folder), "me/mine", "--no-images", "-y"]) == 0
    out, err = capsys.readouterr()
    assert PICTURE not in (hub.files / "report.html").read_bytes()
    assert "report.html shows" not in err
    assert "stays in the history" in err
    assert "uploaded to https://hub.example/me/mine" in out
    assert hub.made == []
    assert hub.commits[0][1]["parent_commit"] == "abc", "if somebody commits meanwhile, ours must not go through"


def test_it_asks_and_shows_what_it_asks_about(folder, hub, monkeypatch, capsys):
    hub.found = existing(False, "README.md")
    answer(monkeypatch, "y\n")
    assert run(["push", str(folder), "me/mine", "--message", "second try"]) == 0
    err = capsys.readouterr().err
    assert "exists, PUBLIC: everybody can see it), as me" in err
    assert "README.md: " in err
    assert err.count("replaces the one there") == 1
    assert "Upload? [y/N]" in err
    assert hub.commits[0][1]["commit_message"] == "second try"


@pytest.mark.parametrize("text", ["\n", "n\n", "no\n"])
def test_no_is_the_default_and_leaves_nothing(folder, hub, monkeypatch, capsys, text):
    answer(monkeypatch, text)
    assert run(["push", str(folder), "me/mine"]) == 1
    assert "nothing was uploaded" in capsys.readouterr().err
    assert (hub.made, hub.commits) == ([], [])


def test_end_of_input_at_the_question_is_no_yes(folder, hub, monkeypatch):
    answer(monkeypatch, "")
    assert run(["push", str(folder), "me/mine"]) == 130
    assert (hub.made, hub.commits) == ([], [])


def test_without_a_terminal_it_needs_yes(folder, hub, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run(["push", str(folder), "me/mine"]) == 2
    assert "there is no terminal to answer on" in capsys.readouterr().err
    assert hub.commits == []


def test_private_is_made_private_and_never_a_public_one(folder, hub, capsys):
    assert run(["push", str(folder), "me/mine", "--private", "--yes"]) == 0
    assert hub.made == [("me/mine", True, "model")]
    hub.found = existing(False)
    assert run(["push", str(folder), "me/mine", "--private", "--yes"]) == 2
    assert "is there already and public" in capsys.readouterr().err
    assert len(hub.commits) == 1


def test_the_users_own_card_goes_as_it_is(folder, hub, capsys):
    (folder / "README.md").write_text("# Mine, at hf-hub:OWNER/NAME\n")
    assert run(["push", str(folder), "me/mine", "--yes"]) == 0
    assert (hub.files / "README.md").read_text() == "# Mine, at hf-hub:me/mine\n"
    assert "README.md is your own text" in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"---\nlicense: [\n---\n# Mine\n", b"---\n- a\n---\n", b"\xff"])
def test_an_own_card_that_the_hub_could_not_read_is_told_first(folder, hub, capsys, text):
    (folder / "README.md").write_bytes(text)
    assert run(["push", str(folder), "me/mine", "--yes"]) == 1
    assert "README.md' is no model card" in capsys.readouterr().err
    assert hub.made == []


def test_a_token_that_may_only_read_is_said_before_the_question(folder, hub, capsys):
    hub.role = "read"
    assert run(["push", str(folder), "me/mine", "--yes"]) == 1
    assert "the token 'laptop' of me may only read" in capsys.readouterr().err
    assert hub.made == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mine", "OWNER/NAME"),
        ("a/b/c", "OWNER/NAME"),
        ("me/", "OWNER/NAME"),
        ("me/mi ne", "OWNER/NAME"),
        ("me/mine.git", "OWNER/NAME"),
        ("../mine", "OWNER/NAME"),
        ("hf-hub:me/mine", "leave out 'hf-hub:': me/mine"),
        ("https://huggingface.co/me/mine/", "leave out 'https://huggingface.co/': me/mine"),
    ],
)
def test_names_that_cannot_be(name, hint, folder, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # any use of it is an error
    assert run(["push", str(folder), name, "--yes"]) == 2
    err = capsys.readouterr().err
    assert f"'{name}' is no name of a repository" in err
    assert hint in err


def test_folders_that_are_no_complete_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)

    def refused(code, message, *more):
        assert run(["push", str(folder), "me/mine", "--yes", *more]) == code
        assert message in capsys.readouterr().err

    refused(2, "the message of the commit is empty", "--message", " ")
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
    assert run(["push", str(tmp_path / "absent"), "me/mine", "--yes"]) == 2


def test_a_header_that_names_a_folder_stays_here(sparse, tmp_path, hub, capsys):
    folder = write_whole_run(tmp_path / "run", sparse, {"source": "/home/somebody/net.pth"})
    assert run(["push", str(folder), "me/mine", "--yes"]) == 1
    assert "names a folder of this machine" in capsys.readouterr().err
    assert hub.commits == []


@pytest.fixture
def real_api(monkeypatch):
    """The real HfApi, with a made-up token, at an address of this machine."""

    def at(address, token="hf_madeup"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: token)

    return at


def test_without_a_network(folder, real_api, monkeypatch, capsys):
    real_api("http://127.0.0.1:9")
    assert run(["push", str(folder), "me/mine", "--yes", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: the Hugging Face Hub is out of reach (")
    assert json.loads(out)["exit_code"] == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run(["push", str(folder), "me/mine", "--yes"]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_without_a_token(folder, real_api, capsys):
    real_api("http://127.0.0.1:9", token=None)
    assert run(["push", str(folder), "me/mine", "--yes"]) == 1
    err = capsys.readouterr().err
    assert "there is no token of the Hugging Face Hub on this machine" in err
    assert "hf auth login" in err
    assert "HF_TOKEN" in err


@pytest.fixture
def server():
    """A Hub that knows who we are and no repository; `answers` maps what it is asked to other status codes."""
    answers, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            what = self.path.rpartition("/")[2].partition("?")[0]
            asked.append((what, body))
            usual = {"whoami-v2": (200, {"name": "me"}), "create": (200, {"url": "https://huggingface.co/me/mine"})}
            code, answer = answers.get(what, usual.get(what, (404, {"error": "no such thing"})))
            text = json.dumps(answer).encode()
            self.send_response(code)
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do

        def log_message(self, *_):
            """Say nothing."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield SimpleNamespace(address=f"http://127.0.0.1:{running.server_port}", answers=answers, asked=asked)
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("whoami-v2", 401, "the Hugging Face Hub does not accept the token"),
        ("whoami-v2", 429, "too many requests"),
        ("whoami-v2", 500, "refused it (500)"),
        ("create", 403, "the token may not write to 'me/mine' (no quota)"),
        ("create", 409, "'me/mine' is there already, and this token may not see it"),
        ("main", 403, "the token may not write to 'me/mine' (no quota); the repository was made and is empty"),
        ("main", 412, "'me/mine' was changed while"),
        (
            "validate-yaml",
            400,
            "the Hugging Face Hub refused README.md: Invalid metadata in README.md. - no such licence",
        ),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(what, code, message, folder, server, real_api, capsys):
    real_api(server.address)
    server.answers |= {
        "validate-yaml": (200, {}),
        "main": (500, {}),
        what: (code, {"errors": [{"message": "no such licence"}]} if code == 400 else {"error": "no quota"}),
    }
    assert run(["push", str(folder), "me/mine", "--yes"]) == 1
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    made = [body for asked, body in server.asked if asked == "create"]
    assert len(made) == (what != "whoami-v2")
    if made:
        assert b"public" in made[0] or b'"private": false' in made[0]
