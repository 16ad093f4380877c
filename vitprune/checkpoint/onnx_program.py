"""An ONNX file that vitprune exported, opened: a module like any other, for evaluation and timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.checkpoint.fixed_batch import FixedBatch
from vitprune.checkpoint.metadata import METADATA_KEY, Metadata, parse_metadata
from vitprune.checkpoint.sparse_file import rebuild
from vitprune.checkpoint.weight_file import check_exists
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError, ExportError, UsageError, VitpruneError
from vitprune.model import TokenFeatures


class OnnxProgram(nn.Module):
    """An ONNX file as a module: images (B, C, H, W) to logits or an embedding (B, num_classes), or to the features of
    all patches (B, P + N, channels), all fp32.

    It runs on the CPU, in the precision it was exported in ("fp32", "fp16" or "int8"): moving and casting it does
    nothing, and a copy is itself. The preprocessing is its `pretrained_cfg`, where timm's data helpers look for it.
    A file for batches of one size, `batch_size`, takes others too, in full batches.
    """

    def __init__(self, session: Any, metadata: Metadata, gives: list[int], precision: str, path: Path) -> None:
        super().__init__()
        self.session = session
        fixed = session.get_inputs()[0].shape[0]
        self.batch_size: int | None = fixed if isinstance(fixed, int) else None
        self._run = self._session if self.batch_size is None else FixedBatch(self._session, self.batch_size)
        self.metadata = metadata
        self.num_classes = 0 if len(gives) > 1 else gives[0]
        self.num_features = gives[-1]
        self.num_prefix_tokens = gives[0] - metadata.num_patches if len(gives) > 1 else 0
        self.precision = precision
        self.path = path
        self.pretrained_cfg = metadata.preprocessing.model_dump()

    def forward(self, images: Tensor) -> Tensor:
        """What the file puts out, on the device of the images.

        Raises:
            UsageError: the images are not of the size that the file takes.
            VitpruneError: the runtime stopped, as a rule because memory ran out.
        """
        expected = self.metadata.preprocessing.input_size
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise UsageError(f"'{self.path}' takes images of (batch, {_text(expected)}), got {tuple(images.shape)}")
        return self._run(images).to(images.device)

    def _session(self, images: Tensor) -> Tensor:
        fed = {self.session.get_inputs()[0].name: images.to("cpu", torch.float32).numpy()}
        try:
            (output,) = self.session.run(None, fed)
        except Exception as error:  # onnxruntime's errors have no common class
            raise VitpruneError(
                f"'{self.path}' stopped at a batch of {len(images)}: {first_line(error)}", "try a lower --batch-size"
            ) from error
        return torch.from_numpy(output)

    def forward_features(self, images: Tensor) -> Tensor:
        """Of a file that puts out the features of all patches: those, (B, P + N, channels)."""
        return self(images)  # type: ignore[no-any-return]

    def structure(self) -> nn.Module:
        """A model that computes what the file does, without its weights: what it costs on paper."""
        sparse = rebuild(self.metadata, "meta")
        return TokenFeatures(sparse) if self.metadata.task == "dense" else sparse

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnnxProgram:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxProgram:
        return self


def require_onnx() -> tuple[ModuleType, ModuleType]:
    """The packages onnx and onnxruntime.

    Raises:
        ExportError: one of the extra is not installed; names it.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter imports it
    except ImportError as error:
        raise ExportError(
            f"ONNX files need the package '{error.name or 'onnx'}', which cannot be imported here: {error}",
            "pip install onnx onnxscript onnxruntime",
        ) from error
    return onnx, onnxruntime


def read_onnx(path: Path) -> OnnxProgram:
    """Open an ONNX file of ours, also a quantised one, to run on as many threads as torch does.

    The file may come from anywhere: its metadata is checked as that of model.safetensors, and tensors that are kept in
    other files are refused.

    Raises:
        ExportError: a package is missing.
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    onnx, runtime = require_onnx()
    check_exists(path)
    content = path.read_bytes()
    try:
        graph = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own class, which depends on how it is built
        raise CheckpointError(f"'{path}' is damaged or no ONNX file: {first_line(error)}", "copy it again") from error
    metadata = _metadata(graph, path)
    kind, kinds = onnx.TensorProto, {tensor.data_type for tensor in _tensors(graph, path)}
    precision = "int8" if kinds & {kind.INT8, kind.UINT8} else "fp16" if kind.FLOAT16 in kinds else "fp32"
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; its warnings are about the optimiser
    try:
        # From memory: what runs is what was checked.
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise CheckpointError(f"onnxruntime cannot open '{path}': {first_line(error)}") from error
    return OnnxProgram(session, metadata, _outputs(session, metadata, path), precision, path)


def _metadata(graph: Any, path: Path) -> Metadata:
    texts = [entry.value for entry in graph.metadata_props if entry.key == METADATA_KEY]
    if len(texts) != 1:
        raise CheckpointError(
            f"'{path}' was not written by vitprune: its metadata has no '{METADATA_KEY}' entry",
            "vitprune export MODEL --format onnx writes a file that has one",
        )
    return parse_metadata(texts[0], path)


def _tensors(message: Any, path: Path) -> Iterator[Any]:
    """All tensors of a graph, wherever in it.

    Raises:
        CheckpointError: one is kept in another file, which could be any file of this machine.
    """
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if field.message_type.name != "TensorProto":
                yield from _tensors(part, path)
                continue
            if part.external_data or part.data_location == 1:
                where = next((entry.value for entry in part.external_data if entry.key == "location"), "another file")
                raise CheckpointError(
                    f"'{path}' keeps the tensor '{part.name}' in '{where}': only whole files are opened",
                    "vitprune export writes one file",
                )
            yield part


def _outputs(session: Any, metadata: Metadata, path: Path) -> list[int]:
    """What the graph gives of an image, (num_classes) or (tokens, channels), once it fits what its metadata says.

    Raises:
        CheckpointError: it does not fit.
    """
    ends = (*session.get_inputs(), *session.get_outputs())
    if [end.type for end in ends] != ["tensor(float)"] * 2:
        raise CheckpointError(f"'{path}' does not turn one fp32 tensor into another", "vitprune did not write it")
    takes, gives = (end.shape for end in ends)
    expected, of_image = metadata.preprocessing.input_size, list(gives[1:])
    dense = metadata.task == "dense"
    fits = len(of_image) == (2 if dense else 1) and all(isinstance(size, int) for size in of_image)
    fits = fits and (not dense or of_image[0] >= metadata.num_patches)
    if len(takes) != 4 or tuple(takes[1:]) != expected or not fits:
        form = "tokens, channels" if dense else "classes" if metadata.task == "classification" else "outputs"
        raise CheckpointError(
            f"'{path}' does not fit its own metadata: it turns ({_text(takes)}) into ({_text(gives)}), "
            f"expected (batch, {_text(expected)}) and (batch, {form})",
            "export the model again",
        )
    if not dense and metadata.class_names is not None and len(metadata.class_names) != of_image[0]:
        raise CheckpointError(f"'{path}' has {gives[1]} classes and its metadata names {len(metadata.class_names)}")
    return of_image


def _text(shape: Any) -> str:
    return ", ".join(map(str, shape))
