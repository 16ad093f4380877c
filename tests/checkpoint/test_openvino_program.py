"""OpenVINO's tests run in a process of their own: what forks after it was loaded may crash."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is None, reason="needs the extra openvino")
def test_openvinos_files():
    tests = Path(__file__).with_name("openvino_program.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-q", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parents[2], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
