"""`--keep 0.5-0.9`: one training and one file for a range of keep ratios, in every command."""

import json

import pytest

import vitprune
from vitprune.cli.app import run

QUICK = ("--device", "cpu", "-j", "0")
TIMED = ("--bench-batch-sizes", "1,2")


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """A run for keep 0.5 to 0.9, and what it printed."""
    root = tmp_path_factory.mktemp("elastic")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run([*finished.arguments, "--keep", "0.5-0.9", *TIMED]) == 0
    return root / "runs" / "test_vit-keep0.5-0.9"


@pytest.fixture
def asked(finished, trained, capsys):
    """`asked(command, *options, code=0)`: the JSON that a command gives of the file, or what it says on stderr."""

    def ask(command, *options, code=0):
        assert run([command, str(trained), *map(str, options), "--json"]) == code
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else err

    return ask


@pytest.fixture
def images(finished):
    return str(finished.root / "images")


def test_the_run_shows_what_was_measured_of_every_ratio(trained):
    report = json.loads((trained / "report.json").read_text())
    assert (report["keep"], report["keep_range"]) == (0.7, [0.5, 0.9])
    rows = report["keeps"]
    assert [row["keep"] for row in rows] == [0.5, 0.6, 0.8, 0.9]
    costs = [row["side"]["gmacs"] for row in rows]
    assert costs == sorted(costs)
    assert costs[1] < report["sparse"]["gmacs"] < costs[2]
    assert all(len(row["delta"]["speedup"]) == 2 and row["delta"]["kl"] >= 0 for row in rows)
    for text in ((trained / "report.html").read_text(), (trained / "README.md").read_text()):
        assert "keep=0.5" in text
        assert all(f"{keep:g}" in text for keep in (0.5, 0.6, 0.7, 0.8, 0.9))
    steps = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert len({step["keep"] for step in steps}) > 1
    config = json.loads((trained / "config.json").read_text())
    assert [row["keep"] for row in config["accuracy"]["keeps"]] == [0.5, 0.6, 0.8, 0.9]


def test_every_command_takes_a_ratio_of_the_file(asked, images, trained, finished, tmp_path):
    picture = f"{images}/val/cat/0.png"
    for keep in (0.5, 0.85):
        sparse = vitprune.load(trained, keep=keep)
        found = asked("eval", images, *QUICK, "--keep", keep)
        assert found["keep"] == keep
        assert found["top1_pct"] == vitprune.evaluate(sparse, images, device="cpu", progress=False)["top1_pct"]
        plan = asked("info", "--keep", keep)
        assert [stage["num_tokens"] for stage in plan["stages"]] == list(sparse.schedule.num_tokens)
        assert plan["keep_range"] == [0.5, 0.9]
        assert asked("predict", picture, *QUICK, "--keep", keep)["keep"] == keep
        drawn = asked("visualize", picture, "--keep", keep, "--device", "cpu", "-o", tmp_path / f"maps{keep}")
        assert [len(kept) for kept in drawn["images"][0]["kept"]] == list(sparse.schedule.num_tokens)
    compared = ("--methods", "ours,random", "--checkpoint", finished.root / "weights.safetensors")
    rows = asked("compare", images, *QUICK, "--keep", 0.85, *compared)["rows"]
    assert [(row["method"], row["keep"]) for row in rows[1:]] == [("ours", 0.85), ("random", 0.85)]
    rows = asked("bench", "--keep", ".9,.5", "--device", "cpu", "-b", "1", "--seconds", "0.02", "--no-bound")["rows"]
    assert [(row["label"], row["keep"]) for row in rows] == [("dense", 1.0), ("keep 0.9", 0.9), ("keep 0.5", 0.5)]
    assert asked("eval", images, *QUICK)["keep"] == 0.7


def test_its_dense_model_is_in_the_file(asked, images, finished, tmp_path):
    """What is asked of both is the same as with the dense weights beside it."""
    limit = "--min-fidelity", "2"
    own, beside = (
        asked("eval", images, *QUICK, *limit, *more)
        for more in ((), ("--checkpoint", finished.root / "weights.safetensors"))
    )
    assert own["delta"] == beside["delta"]
    assert own["dense"] == beside["dense"]
    assert asked("visualize", f"{images}/val/cat/0.png", "--device", "cpu", "-o", tmp_path / "maps")["dense"] == "dense"


def test_a_ratio_that_it_has_not_is_refused(asked, images, finished, capsys):
    for command, *options in (
        ("eval", images),
        ("info",),
        ("bench",),
        ("predict", f"{images}/val/cat/0.png"),
        ("visualize", f"{images}/val/cat/0.png"),
        ("export",),
        ("compare", images, "--checkpoint", finished.root / "weights.safetensors"),
    ):
        said = asked(command, *options, "--keep", 0.4, code=2)
        assert "keep ratio 0.4 is outside of the range that the model was trained for, 0.5 to 0.9" in said, command
    assert "has its own plan" in asked("info", "--keep", 0.6, "--prune-at", "1", code=2)
    assert run(["eval", str(finished.folder), images, "--keep", "0.6"]) == 2
    assert "was trained for keep 0.7 alone" in capsys.readouterr().err
    weights = str(finished.root / "weights.safetensors")
    assert run(["eval", "test_vit", images, "--checkpoint", weights, "--keep", "0.6"]) == 2
    assert "is a dense model, and --keep 0.6 is asked for" in capsys.readouterr().err


def test_a_sweep_of_the_file_trains_nothing(asked, images, finished, tmp_path):
    weights, out = ("--checkpoint", finished.root / "weights.safetensors"), tmp_path / "sweep"
    result = asked("sweep", images, *weights, *QUICK, *TIMED, "--keep", ".6,.8", "-o", out)
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.8", "keep 0.6"]
    assert sorted(path.name for path in out.iterdir()) == ["sweep.html", "sweep.json"]
    assert (result["failed"], result["recipe"]) == ([], {})
    costs = {row["label"]: row["gmacs"] for row in result["rows"]}
    agreed = {row["label"]: row["delta"]["agreement_pct"] for row in result["rows"]}
    fixed, curve = result["adaptive"]["fixed"], result["adaptive"]["curve"]
    assert [each["first"] for each in fixed] == ["keep 0.8", "keep 0.6"]
    for each in fixed:
        assert each["gmacs_mean"] == pytest.approx(costs[each["first"]])
        assert 100 * (1 - each["loss"]) == pytest.approx(agreed[each["first"]])
    assert curve[0]["gmacs_mean"] == pytest.approx(costs["keep 0.6"])
    assert curve[-1]["loss"] == 0
    assert "Same answer as dense" in (out / "sweep.html").read_text()
    for options, words in (
        (("--steps", 3), "is trained already"),
        (("--elastic",), "is trained already"),
        (("--prune-at", "1"), "is trained already"),
        (("--keep", ".3,.6"), "keep ratio 0.3 is outside of the range"),
    ):
        assert words in asked("sweep", images, *weights, *QUICK, *options, "-o", tmp_path / "no", code=2)
    assert not (tmp_path / "no").exists()


def test_an_elastic_sweep_trains_once(finished, images, tmp_path, capsys):
    start = ["sweep", *finished.arguments[1:], *TIMED, "--elastic"]
    assert run([*start, "--keep", ".8", "-o", str(tmp_path / "one")]) == 2
    assert "--elastic trains for a range, and --keep is '.8'" in capsys.readouterr().err
    assert run([*start, "--keep", ".5,.7,.9", "-o", str(tmp_path / "sweep"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.9", "keep 0.7", "keep 0.5"]
    assert {row["run"] for row in result["rows"][1:]} == {"keep0.5-0.9"}
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["keep0.5-0.9", "sweep.html", "sweep.json"]
    report = json.loads((tmp_path / "sweep" / "keep0.5-0.9" / "report.json").read_text())
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["keep 0.5"]["top1_pct"] == report["keeps"][0]["side"]["top1_pct"]
    assert run([*start, "--keep", ".5,.6,.9", "-o", str(tmp_path / "sweep"), "--resume"]) == 0
    assert "is complete and kept" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_exported_at_a_ratio_and_trained_compiled(asked, finished, images, tmp_path, capsys):
    done = asked("export", "--keep", 0.5, "-o", tmp_path / "half.onnx")
    assert done["keep"] == 0.5
    assert run(["eval", str(tmp_path / "half.onnx"), images, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == 0.5
    assert run(["eval", str(tmp_path / "half.onnx"), images, "--keep", "0.6"]) == 2
    assert "is an exported file, which has one keep ratio" in capsys.readouterr().err
    few = ["--pretraining-steps", "0", "--steps", "3", "--limit", "6", *TIMED]
    kl = []
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        out = tmp_path / name
        assert run([*finished.arguments, *few, "--keep", "0.5-0.9", *more, "-o", str(out)]) == 0
        kl.append(json.loads((out / "report.json").read_text())["keeps"][0]["delta"]["kl"])
    assert kl[0] == pytest.approx(kl[1], rel=0.05, abs=1e-4)


def test_where_one_ratio_of_a_range_is_shown_that_is_said(capsys):
    for command in (["models", "test_vit2"], ["info", "test_vit2"]):
        assert run([*command, "--keep", "0.5-0.9"]) == 0
        assert "of the range 0.5 to 0.9 its middle is shown: keep 0.7" in capsys.readouterr().err
        assert run([*command, "--keep", "0.7"]) == 0
        assert "middle" not in capsys.readouterr().err
