"""The environment block: complete, serialisable, and nothing private."""

import getpass
import json
import socket
from pathlib import Path

import torch

import vitprune
from vitprune.measure import describe_environment, environment


def test_environment_survives_json_and_tells_nothing_private():
    block = describe_environment()
    assert json.loads(json.dumps(block)) == block
    assert block["vitprune"] == vitprune.__version__
    assert block["torch"] == torch.__version__
    assert all(block[key] for key in ("torchvision", "timm", "accelerate", "python", "platform", "cpu", "num_cpus"))
    assert block["fused_attention"] is True
    values = json.dumps(list(block.values()))
    assert str(Path.home()) not in values
    assert str(Path.cwd()) not in values
    assert not {socket.gethostname(), getpass.getuser()} & set(values.replace('"', " ").replace(",", " ").split())
    assert environment._version("no-such-package-here") is None


def test_cpu_name_comes_from_proc_cpuinfo_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    assert describe_environment()["cpu"]
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n", encoding="utf-8")
    assert describe_environment()["cpu"]
    name = "AMD EPYC 9454 48-Core Processor"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: {name}\n", encoding="utf-8")
    assert describe_environment()["cpu"] == name
