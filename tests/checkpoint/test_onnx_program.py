"""ONNX files as modules; and from anywhere: an error of ours or a program, no other file, no flood of memory."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitprune.checkpoint.metadata import METADATA_KEY
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.checkpoint.sparse_file import describe
from vitprune.cli.app import run
from vitprune.errors import CheckpointError, UsageError, VitpruneError
from vitprune.model import TokenFeatures

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def written(make_sparse, tmp_path_factory):
    """A file of two classes, means of the images' channels through a linear layer, and its header."""
    path = tmp_path_factory.mktemp("program") / "model.onnx"
    metadata = describe(make_sparse(num_classes=2), class_names=("cat", "dog"))
    size, make = list(metadata.preprocessing.input_size), onnx.helper
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(3, 2, generator=generator), "axes": torch.tensor([2, 3])}
    graph = make.make_graph(
        [
            make.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
            make.make_node("MatMul", ["means", "weight"], ["logits"]),
        ],
        "graph",
        [make.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", *size])],
        [make.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 2])],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key=METADATA_KEY, value=metadata.model_dump_json())
    onnx.save(model, path)
    return SimpleNamespace(path=path, header=json.loads(metadata.model_dump_json()), weight=weights["weight"])


@pytest.fixture
def rewrite(written, tmp_path):
    """`rewrite(change)`: the file after `change(graph)`; or with a dict or a text as its header."""

    def write(change):
        model = onnx.load(written.path)
        if callable(change):
            change(model)
        else:
            text = change if isinstance(change, str) else json.dumps(written.header | change)
            model.metadata_props[0].value = text
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def images_for(written, count, **options):
    return torch.randn(count, *written.header["preprocessing"]["input_size"], **options)


def test_it_is_a_module_like_any_other(written):
    program = read_onnx(written.path)
    assert (program.num_classes, program.precision, program.metadata.class_names) == (2, "fp32", ["cat", "dog"])
    assert copy.deepcopy(program).to(torch.bfloat16).eval() is program
    images = images_for(written, 4)
    torch.testing.assert_close(program(images), images.mean(dim=(2, 3)) @ written.weight)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = program(images)
    assert torch.equal(mixed, program(images)), "it knows one precision"
    assert program(images.bfloat16()).dtype == torch.float32
    with pytest.raises(UsageError, match=r"takes images of \(batch, 3, \d+, \d+\), got \(4, 3, 32, 32\)"):
        program(images[..., :32, :32])


def of_tokens(model, tokens):
    """Give (batch, tokens, 2): the classes' logits once a token."""
    node, size = model.graph.node[1], onnx.numpy_helper.from_array(torch.tensor([1]).numpy(), "one")
    node.output[0] = "of_image"
    shape = onnx.numpy_helper.from_array(torch.tensor([1, tokens, 1]).numpy(), "shape")
    model.graph.initializer.extend([size, shape])
    model.graph.node.append(onnx.helper.make_node("Unsqueeze", ["of_image", "one"], ["row"]))
    model.graph.node.append(onnx.helper.make_node("Expand", ["row", "shape"], ["logits"]))
    dims = model.graph.output[0].type.tensor_type.shape.dim
    dims[1].dim_value = tokens
    dims.add(dim_value=2)


def says(model, **entries):
    header = json.loads(model.metadata_props[0].value) | entries
    model.metadata_props[0].value = json.dumps(header)


def test_what_comes_out_is_understood_by_the_task(written, rewrite):
    patches = written.header["num_patches"]

    def tokens(model):
        of_tokens(model, patches + 3)
        says(model, task="dense")

    program, images = read_onnx(rewrite(tokens)), images_for(written, 4)
    assert (program.num_classes, program.num_features, program.num_prefix_tokens) == (0, 2, 3)
    assert isinstance(program.structure(), TokenFeatures), "no head is run"
    expected = images.mean(dim=(2, 3)) @ written.weight
    torch.testing.assert_close(program.forward_features(images), expected[:, None].expand(-1, patches + 3, -1))
    for task in ("embedding", "regression", "multilabel"):
        program = read_onnx(rewrite({"task": task, "class_names": None}))
        assert (program.metadata.task, program.num_classes, program.num_features) == (task, 2, 2)
        torch.testing.assert_close(program(images), expected)


def test_features_alone_have_nothing_to_be_measured_by(written, rewrite, image_folder, capsys):
    def tokens(model):
        of_tokens(model, written.header["num_patches"] + 1)
        says(model, task="dense")

    path = rewrite(tokens)
    assert run(["eval", str(path), str(image_folder), "-j", "0"]) != 0
    err = capsys.readouterr().err
    assert f"nothing to measure '{path}' alone by" in err
    assert "hint: name the dense model's weights: --checkpoint FILE" in err


def test_a_pass_that_fails_is_an_error_of_ours(written, monkeypatch):
    program = read_onnx(written.path)

    def broken(images):
        raise RuntimeError("bad allocation")

    program.engine = broken
    with pytest.raises(VitpruneError, match="stopped at a batch of 2: bad allocation"):
        program(images_for(written, 2))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), cut=st.integers(0, 400))
def test_any_bytes_are_an_error_of_ours(written, tmp_path, content, cut):
    path = tmp_path / "model.onnx"
    path.write_bytes(written.path.read_bytes()[:cut] + content)
    with pytest.raises(CheckpointError, match=r"model\.onnx"):
        read_onnx(path)


def test_what_does_not_hold_together_is_refused(written, rewrite):
    def few_tokens(model):
        of_tokens(model, written.header["num_patches"] - 1)
        says(model, task="dense")

    def scalar(model):
        model.graph.node[1].output[0] = "rows"
        model.graph.node.append(onnx.helper.make_node("ReduceSum", ["rows"], ["logits"], keepdims=0))
        del model.graph.output[0].type.tensor_type.shape.dim[:]

    another_size = written.header["preprocessing"] | {"input_size": [3, 8, 8]}
    for change, message in (
        ({"architecture": "hf-hub:someone/model"}, "architecture"),
        ({"class_names": ["cat"]}, "has 2 classes and its metadata names 1"),
        ({"class_names": ["x"] * (9 * 2**20 // 5)}, "bytes long"),
        ({"preprocessing": another_size}, r"does not fit its own metadata.*\(batch, 3, 8, 8\)"),
        ({"task": "dense"}, r"into \(batch, 2\), expected .* and \(batch, tokens, channels\)"),
        ({"task": "retrieval"}, "task"),
        (few_tokens, r"and \(batch, tokens, channels\)"),
        (lambda model: of_tokens(model, 20), r"into \(batch, 20, 2\), expected .* and \(batch, classes\)"),
        (scalar, "does not fit its own metadata"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (lambda model: model.ClearField("metadata_props"), f"not written by vitprune: .* no '{METADATA_KEY}'"),
        (lambda model: setattr(model.graph.node[1], "op_type", "Nonsense"), r"onnxruntime cannot open .*model\.onnx"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_onnx(rewrite(change))


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "model.data"])
def test_weights_in_another_file_are_not_read(rewrite, location):
    def outside(tensor):
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        return tensor

    def constant(model):
        """In a branch of a node: where checkers forget to look."""
        tensor = outside(onnx.TensorProto(name="hidden", data_type=1, dims=[2]))
        inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "g", [], [])
        model.graph.node.add(op_type="If", attribute=[onnx.helper.make_attribute("then_branch", inner)])

    for change in (lambda model: outside(model.graph.initializer[0]), constant):
        with pytest.raises(CheckpointError, match="only whole files are opened") as caught:
            read_onnx(rewrite(change))
        assert location in caught.value.message
