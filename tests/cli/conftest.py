"""A terminal that keeps what was written to it."""

import io
import re
import sys

import pytest

from vitprune.cli.terminal import Level, prepare_streams, set_level


class Screen(io.TextIOWrapper):
    """A terminal that keeps what was written to it."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self):
        return True

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)

    def lines(self):
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.text()).splitlines()


@pytest.fixture
def screen(monkeypatch):
    """`screen(columns, encoding, **environment)`: stdout and stderr as terminals of that width."""

    def make(columns=80, encoding="utf-8", **environment):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}.items():
            monkeypatch.setenv(name, value)
        out, err = Screen(encoding), Screen(encoding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        prepare_streams()
        return out, err

    return make


@pytest.fixture(autouse=True)
def normal_level():
    yield
    set_level(Level.NORMAL)
