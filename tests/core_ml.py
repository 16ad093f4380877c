"""A Core ML package run by PyTorch, one operation after another: what is in the file, where Core ML does not run."""

import coremltools
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load

TYPES = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


def run_package(path, images):
    """The output of the package of this path for images (B, C, H, W)."""
    package = coremltools.models.MLModel(str(path), skip_model_load=True)
    spec = package.get_spec()
    program = load(spec, spec.specificationVersion, package.weights_dir).functions["main"]
    values = {next(iter(program.inputs)): images}

    def value(var):
        if isinstance(var, list | tuple):
            return [value(each) for each in var]
        if var.val is None:
            return values[var.name]
        return torch.as_tensor(var.val) if getattr(var.val, "ndim", 0) else getattr(var.val, "item", lambda: var.val)()

    for step in program.operations:
        if step.op_type != "const":
            given = {name: value(var) for name, var in step.inputs.items() if var is not None}
            found = OPERATIONS[step.op_type](**given)
            for var, each in zip(step.outputs, found if isinstance(found, tuple) else (found,), strict=True):
                assert tuple(each.shape) == tuple(var.shape), step.op_type
                values[var.name] = each
    (output,) = program.outputs
    return values[output.name]


def _conv(x, weight, strides, pad_type, dilations, groups, pad=None, bias=None):
    assert pad_type == "valid"
    return F.conv2d(x, weight, bias, strides.tolist(), 0, dilations.tolist(), groups)


def _slice(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    def each(values, fallback):
        return [fallback] * x.ndim if values is None else values.tolist()

    parts = zip(each(begin, 0), each(end, 0), each(stride, 1), each(begin_mask, False), each(end_mask, False),
                each(squeeze_mask, False), strict=True)  # fmt: skip
    return x[tuple(b if one else slice(None if b0 else b, None if e0 else e, s) for b, e, s, b0, e0, one in parts)]


def _gather(x, indices, axis, batch_dims=0, validate_indices=False):
    assert batch_dims == 0
    indices = torch.as_tensor(indices)
    return x.index_select(axis, indices.flatten()).unflatten(axis, indices.shape or (1,))


def _topk(x, k, axis, ascending, sort=True, return_indices=True, output_indices_dtype="int32"):
    found = x.topk(k, axis, largest=not ascending, sorted=sort)
    return found.values, found.indices.int()


def _split(x, axis, num_splits=None, split_sizes=None):
    return x.chunk(num_splits, axis) if split_sizes is None else x.split(split_sizes.tolist(), axis)


def _expand_dims(x, axes):
    for axis in axes.tolist():
        x = x.unsqueeze(axis)
    return x


def _pad(x, pad, mode, constant_val):
    pairs = pad.reshape(-1, 2).flip(0)  # torch begins with the last dimension
    return F.pad(x, pairs.flatten().tolist(), mode, constant_val)


def _matmul(x, y, transpose_x=False, transpose_y=False):
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _reduced(function):
    def reduced(x, axes=None, keep_dims=False):
        return function(x, tuple(axes.tolist()) if axes is not None else tuple(range(x.ndim)), keep_dims)

    return reduced


def _of_two(function):
    return lambda x, y: function(torch.as_tensor(x), torch.as_tensor(y))


OPERATIONS = {
    **{name: _of_two(getattr(torch, name)) for name in ("add", "sub", "mul", "less", "logical_and", "logical_or")},
    "equal": _of_two(torch.eq),
    "real_div": _of_two(torch.true_divide),
    "exp": torch.exp,
    "rsqrt": lambda x, epsilon: (x + epsilon).rsqrt(),
    "log": lambda x, epsilon: (x + epsilon).log(),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "silu": lambda x: F.silu(x),
    "gelu": lambda x, mode: F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode]),
    "softmax": lambda x, axis: x.softmax(axis),
    "layer_norm": lambda x, axes, epsilon, gamma=None, beta=None: F.layer_norm(x, x.shape[-1:], gamma, beta, epsilon),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": _matmul,
    "conv": _conv,
    "cast": lambda x, dtype: x.to(TYPES[dtype]),
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "gather": _gather,
    "gather_nd": lambda x, indices, batch_dims=0, validate_indices=False: x[tuple(indices.unbind(-1))],
    "gather_along_axis": lambda x, indices, axis, validate_indices=False: x.gather(axis, indices.long()),
    "topk": _topk,
    "reduce_argmax": lambda x, axis, keep_dims: x.argmax(axis, keep_dims).int(),
    "reduce_sum": _reduced(torch.sum),
    "reduce_mean": _reduced(torch.mean),
    "reduce_max": _reduced(torch.amax),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "concat": lambda values, axis, interleave=False: torch.cat(values, axis),
    "stack": lambda values, axis: torch.stack(values, axis),
    "split": _split,
    "tile": lambda x, reps: x.repeat(reps.tolist()),
    "expand_dims": _expand_dims,
    "squeeze": lambda x, axes=None: x.squeeze(tuple(axes.tolist())),
    "slice_by_index": _slice,
    "pad": _pad,
}
"""By the names of MIL, Core ML's language."""
