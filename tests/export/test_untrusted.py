"""Exported files from anywhere: an error of ours or a program, and no code, no other file, no flood of memory."""

import contextlib
import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from vitprune.checkpoint.metadata import METADATA_KEY
from vitprune.checkpoint.sparse_file import describe
from vitprune.errors import CheckpointError, VitpruneError
from vitprune.export import open_program
from vitprune.export.onnx_file import write_onnx
from vitprune.export.pt2_file import write_pt2

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Small(nn.Module):
    """Two classes, with the input of the metadata's model."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def files(make_sparse, tmp_path_factory):
    """One file of each format, and their metadata."""
    folder = tmp_path_factory.mktemp("programs")
    metadata = describe(make_sparse(num_classes=2), class_names=("cat", "dog"))
    example = torch.zeros(3, *metadata.preprocessing.input_size)
    write_onnx(Small().eval(), example, metadata, folder / "model.onnx")
    write_pt2(Small().eval(), example, metadata, folder / "model.pt2")
    return folder, json.loads(metadata.model_dump_json())


@pytest.fixture
def with_header(files, tmp_path):
    """Write a file of either format with other metadata."""

    def write(kind, header):
        text = header if isinstance(header, str) else json.dumps(header)
        if kind == "pt2":
            return rewrite_pt2(files[0], tmp_path, {"extra/vitprune.json": text.encode()})
        return rewrite_onnx(files[0], tmp_path, lambda graph: setattr(graph.metadata_props[0], "value", text))

    return write


def rewrite_onnx(folder, output, change):
    graph = onnx.load(folder / "model.onnx")
    change(graph)
    onnx.save(graph, output / "model.onnx")
    return output / "model.onnx"


def rewrite_pt2(folder, output, changes):
    """With records replaced, added, or with None left out."""
    path = output / "model.pt2"
    with zipfile.ZipFile(folder / "model.pt2") as old, zipfile.ZipFile(path, "w") as new:
        root = old.namelist()[0].split("/")[0]
        records = {name: old.read(name) for name in old.namelist()}
        records |= {f"{root}/{name}": content for name, content in changes.items()}
        for name, content in records.items():
            if content is not None:
                new.writestr(name, content)
    return path


def graph_of(folder):
    reader = torch._C.PyTorchFileReader(str(folder / "model.pt2"))
    return json.loads(reader.get_record("models/model.json"))


class Harmful:
    """Touches a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_unchanged_files_open(files, with_header, kind):
    for path in (files[0] / f"model.{kind}", with_header(kind, files[1])):
        program = open_program(path)
        assert program.num_classes == 2
        assert program(torch.zeros(4, *program.metadata.preprocessing.input_size)).shape == (4, 2)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@quick
@given(content=st.binary(max_size=300), cut=st.integers(0, 400))
def test_any_bytes_are_an_error_of_ours(files, tmp_path, kind, content, cut):
    path = tmp_path / f"model.{kind}"
    path.write_bytes((files[0] / path.name).read_bytes()[:cut] + content)
    with pytest.raises(CheckpointError, match=f"model.{kind}"):
        open_program(path)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version"),
        ({"architecture": "hf-hub:someone/model"}, "architecture"),
        ({"model": "../../etc/passwd"}, "model"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"class_names": ["cat"]}, "has 2 classes and its metadata names 1"),
        ({"class_names": ["x"] * (9 * 2**20 // 5)}, "bytes long"),
        ({"unheard": 1}, "unheard"),
    ],
)
def test_what_metadata_may_not_say(files, with_header, kind, change, message):
    with pytest.raises(CheckpointError, match=message):
        open_program(with_header(kind, files[1] | change))


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_another_image_size_than_the_program_takes(files, with_header, kind):
    header = files[1] | {"preprocessing": files[1]["preprocessing"] | {"input_size": [3, 8, 8]}}
    with pytest.raises(CheckpointError, match=r"does not fit its own metadata.*\(batch, 3, 8, 8\)"):
        open_program(with_header(kind, header))


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_metadata_that_is_no_header(with_header, kind, text):
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_program(with_header(kind, text))


def test_files_of_others_are_named(files, tmp_path):
    path = rewrite_onnx(files[0], tmp_path, lambda graph: graph.ClearField("metadata_props"))
    with pytest.raises(CheckpointError, match=f"was not written by vitprune: its metadata has no '{METADATA_KEY}'"):
        open_program(path)
    path = rewrite_pt2(files[0], tmp_path, {"extra/vitprune.json": None})
    with pytest.raises(CheckpointError, match="was not written by vitprune"):
        open_program(path)


# ONNX


def _outside(tensor, location):
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "model.data"])
def test_weights_in_another_file_are_not_read(files, tmp_path, location):
    def initializer(graph):
        _outside(graph.graph.initializer[0], location)

    def constant(graph):
        """In a branch of a node: where checkers forget to look."""
        tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[2])
        _outside(tensor, location)
        inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "g", [], [])
        graph.graph.node.add(op_type="If", attribute=[onnx.helper.make_attribute("then_branch", inner)])

    for change in (initializer, constant):
        with pytest.raises(CheckpointError, match="only whole files are opened") as caught:
            open_program(rewrite_onnx(files[0], tmp_path, change))
        assert location in caught.value.message


def test_a_fixed_batch_size_is_refused(files, tmp_path):
    def fix(graph):
        for value in (*graph.graph.input, *graph.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 3

    with pytest.raises(CheckpointError, match="takes batches of 3 images only"):
        open_program(rewrite_onnx(files[0], tmp_path, fix))


def test_a_graph_that_onnxruntime_does_not_take(files, tmp_path):
    def unknown(graph):
        graph.graph.node[0].op_type = "Nonsense"

    with pytest.raises(CheckpointError, match=r"onnxruntime cannot open .*model\.onnx"):
        open_program(rewrite_onnx(files[0], tmp_path, unknown))


# .pt2


@pytest.mark.parametrize(
    "name",
    [
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/a.so",
        "data/weights/model.pt",
    ],
)
def test_a_record_that_could_run_code_is_refused(files, tmp_path, name):
    harm = tmp_path / "harm"
    path = rewrite_pt2(files[0], tmp_path, {name: pickle.dumps(Harmful(harm))})
    with pytest.raises(CheckpointError, match=f"could run code when opened: it holds '{name}'"):
        open_program(path)
    assert not harm.exists()


def test_pickled_objects_are_refused(files, tmp_path):
    harm = tmp_path / "harm"
    content = io.BytesIO()
    torch.save(Harmful(harm), content)
    path = rewrite_pt2(files[0], tmp_path, {"data/sample_inputs/model.pt": content.getvalue()})
    with pytest.raises(CheckpointError, match="it holds pickled Python objects"):
        open_program(path)
    assert not harm.exists()


def test_pickled_weights_are_refused(files, tmp_path):
    harm = tmp_path / "harm"
    reader = torch._C.PyTorchFileReader(str(files[0] / "model.pt2"))
    config = json.loads(reader.get_record("data/weights/model_weights_config.json"))
    for payload in config["config"].values():
        payload["use_pickle"] = True
    content = io.BytesIO()
    torch.save(Harmful(harm), content)
    changes = {"data/weights/model_weights_config.json": json.dumps(config).encode()}
    changes |= {f"data/weights/{payload['path_name']}": content.getvalue() for payload in config["config"].values()}
    with pytest.raises(CheckpointError, match="it holds pickled Python objects"):
        open_program(rewrite_pt2(files[0], tmp_path, changes))
    assert not harm.exists()


def _target(graph, harm):
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"


def _file(graph, harm):
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def _size(graph, harm):
    values = graph["graph_module"]["graph"]["tensor_values"]["images"]["sizes"]
    values[0]["as_expr"]["expr_str"] = f"__import__('pathlib').Path({str(harm)!r}).touch()"


def _power(graph, harm):
    values = graph["graph_module"]["graph"]["tensor_values"]["images"]["sizes"]
    values[0]["as_expr"]["expr_str"] = "9**9**9**9"


def _name(graph, harm):
    graph["graph_module"]["graph"]["nodes"][0]["name"] = f"x\nopen({str(harm)!r}, 'w')"


def _about(graph, harm):
    graph["graph_module"]["graph"]["nodes"][0]["metadata"]["source_fn_stack"] = "x,torch.hub.load"


@pytest.mark.parametrize("change", [_target, _file, _size, _power, _name, _about])
def test_a_graph_that_could_run_code_is_refused(files, tmp_path, change):
    graph, harm = graph_of(files[0]), tmp_path / "harm"
    change(graph, harm)
    path = rewrite_pt2(files[0], tmp_path, {"models/model.json": json.dumps(graph).encode()})
    with pytest.raises(CheckpointError, match="could run code when opened: its graph"):
        open_program(path)
    assert not harm.exists()


@quick
@given(data=st.data())
def test_any_change_of_a_graph_is_a_program_or_an_error_of_ours(files, tmp_path, data):
    graph = graph_of(files[0])
    part, key = graph, None
    while isinstance(part, (dict, list)) and part and (key is None or data.draw(st.integers(0, 5))):
        whole, key = part, data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        part = part[key]
    whole[key] = data.draw(st.none() | st.integers(-5, 5) | st.text(max_size=8) | st.lists(st.integers(), max_size=2))
    path = rewrite_pt2(files[0], tmp_path, {"models/model.json": json.dumps(graph).encode()})
    with contextlib.suppress(VitpruneError):
        open_program(path)
