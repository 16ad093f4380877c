"""Devices and precisions: what is there is picked, what is not is refused with a way out."""

from contextlib import nullcontext

import pytest
import torch

from vitprune.common import devices
from vitprune.common.devices import pick_device, pick_precision
from vitprune.errors import DeviceError, UsageError

CPU = torch.device("cpu")


@pytest.fixture
def set_hardware(monkeypatch: pytest.MonkeyPatch):
    """Pretend to have this many CUDA GPUs, and MPS or not."""

    def pretend(gpus: int = 0, mps: bool = False, cuda_build: bool = True) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0" if cuda_build else None)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(("gpus", "mps", "expected"), [(1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_auto_takes_the_fastest_there_is(set_hardware, gpus: int, mps: bool, expected: str) -> None:
    set_hardware(gpus, mps)
    assert pick_device("auto").type == expected


def test_named_devices_are_taken_when_there(set_hardware) -> None:
    set_hardware(gpus=2, mps=True)
    assert [str(pick_device(name)) for name in ("cpu", "cuda", "cuda:1", "mps")] == ["cpu", "cuda", "cuda:1", "mps"]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("cuda", "device 'cuda' is not there: this PyTorch sees no CUDA GPU", "--device cpu"),
        ("cuda:1", "device 'cuda:1' is not there: this PyTorch sees no CUDA GPU", "--device cpu"),
        ("mps", "device 'mps' is not there", "--device cpu"),
        ("gpu", "device 'gpu' is unknown", "auto, cpu, cuda"),
        ("cuda:x", "device 'cuda:x' is unknown", "auto, cpu, cuda"),
        ("", "device '' is unknown", "auto, cpu, cuda"),
    ],
)
def test_missing_and_unknown_devices_are_refused(set_hardware, name: str, message: str, hint: str) -> None:
    set_hardware()
    with pytest.raises(DeviceError) as caught:
        pick_device(name)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_gpu_number_too_high_lists_the_gpus(set_hardware) -> None:
    set_hardware(gpus=2)
    with pytest.raises(DeviceError, match="'cuda:2' is not there: this PyTorch sees cuda:0, cuda:1"):
        pick_device("cuda:2")


def test_a_build_without_cuda_is_told_apart_from_a_missing_gpu(set_hardware) -> None:
    set_hardware(cuda_build=False)
    with pytest.raises(DeviceError, match="is built without CUDA"):
        pick_device("cuda")


def test_evaluation_is_exact_unless_told_otherwise() -> None:
    assert pick_precision("auto", CPU, training=False) == "fp32"
    assert pick_precision("bf16", CPU, training=False) == "bf16"


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16"), (False, "fp32")])
def test_training_on_the_cpu_is_bf16_only_in_hardware(
    monkeypatch: pytest.MonkeyPatch, fast: bool, expected: str
) -> None:
    monkeypatch.setattr(devices, "cpu_has_fast_bf16", lambda: fast)
    assert pick_precision("auto", CPU, training=True) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_training_on_older_gpus_is_fp16(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    asked_of = []

    def device(chosen: torch.device) -> nullcontext[None]:
        asked_of.append(chosen)
        return nullcontext()

    # Emulated bf16 is slow, so the answer must not include it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cuda, "device", device)
    assert pick_precision("auto", torch.device("cuda:1"), training=True) == expected
    assert asked_of == [torch.device("cuda:1")]


def test_training_on_mps_is_fp32() -> None:
    assert pick_precision("auto", torch.device("mps"), training=True) == "fp32"


def test_a_torch_without_the_private_queries_has_no_fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert devices.cpu_has_fast_bf16() is False


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="'fp16' does not go with device 'cpu'") as caught:
        pick_precision("fp16", CPU, training=False)
    assert "bf16" in (caught.value.hint or "")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision 'int8' is unknown"):
        pick_precision("int8", CPU, training=True)
