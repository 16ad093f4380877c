"""The environment block: complete, serialisable, and nothing private."""

import getpass
import json
import socket
from pathlib import Path

import pytest
import torch

import vitprune
from vitprune.measure import describe_environment, environment


def test_environment_survives_json() -> None:
    block = describe_environment()
    assert json.loads(json.dumps(block)) == block
    assert block["vitprune"] == vitprune.__version__
    assert block["torch"] == torch.__version__
    assert all(block[key] for key in ("torchvision", "timm", "accelerate", "python", "platform", "cpu", "num_cpus"))


def test_environment_tells_nothing_private() -> None:
    values = json.dumps(list(describe_environment().values()))
    assert str(Path.home()) not in values
    assert str(Path.cwd()) not in values
    words = set(values.replace('"', " ").replace(",", " ").split())
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words


def test_cpu_name_comes_from_proc_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9454 48-Core Processor\n", encoding="utf-8")
    monkeypatch.setattr(environment, "_CPUINFO", cpuinfo)
    assert describe_environment()["cpu"] == "AMD EPYC 9454 48-Core Processor"


@pytest.mark.parametrize("text", [None, "processor\t: 0\nBogoMIPS\t: 50.00\n"])
def test_cpu_has_a_name_without_a_model_name(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text, encoding="utf-8")
    monkeypatch.setattr(environment, "_CPUINFO", cpuinfo)
    assert describe_environment()["cpu"]


def test_a_package_that_is_not_installed_is_none() -> None:
    assert environment._version("no-such-package-here") is None
