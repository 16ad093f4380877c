"""Devices and precisions: what is there is picked, what is not is refused with a way out."""

from contextlib import nullcontext

import pytest
import torch

from vitprune.common import devices
from vitprune.common.devices import pick_device, pick_precision
from vitprune.errors import DeviceError, UsageError


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
    ("hardware", "name", "message", "hint"),
    [
        ({}, "cuda:1", "is not available: this PyTorch sees no CUDA GPU", "--device cpu"),
        ({}, "mps", "is not available", "--device cpu"),
        *(({}, name, "is unknown", "auto, cpu, cuda") for name in ("gpu", "cuda:x", "")),
        ({"gpus": 2}, "cuda:2", "is not available: this PyTorch sees cuda:0, cuda:1", "--device cuda"),
        ({"cuda_build": False}, "cuda", "is built without CUDA", "--device cpu, or install"),
    ],
)
def test_missing_and_unknown_devices_are_refused(set_hardware, hardware, name, message, hint) -> None:
    set_hardware(**hardware)
    with pytest.raises(DeviceError) as caught:
        pick_device(name)
    assert f"device '{name}' " in caught.value.message
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "device", "training", "fast", "expected"),
    [
        ("auto", "cpu", False, True, "fp32"),
        ("bf16", "cpu", False, False, "bf16"),
        ("auto", "cpu", True, True, "bf16"),
        ("auto", "cpu", True, False, "fp32"),
        ("auto", "mps", True, True, "fp32"),
    ],
)
def test_auto_is_exact_but_in_training_where_bf16_is_fast(monkeypatch, name, device, training, fast, expected) -> None:
    monkeypatch.setattr(devices, "cpu_has_fast_bf16", lambda: fast)
    assert pick_precision(name, torch.device(device), training=training) == expected


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("fp16", "'fp16' does not go with device 'cpu'", "bf16"),
        ("int8", "precision 'int8' is unknown", "auto, fp32, bf16, fp16"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pick_precision(name, torch.device("cpu"), training=False)
    assert hint in caught.value.hint


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


def test_a_torch_without_the_private_queries_has_no_fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert devices.cpu_has_fast_bf16() is False
