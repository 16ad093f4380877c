"""Finished runs, made up."""

import pytest
from finished_run import write_run


@pytest.fixture
def make_run(tmp_path):
    """`make_run(keep_maps=..., steps=..., **changes of report.json)`: a run folder without its model."""

    def make(**changes):
        return write_run(tmp_path / "run", **changes)

    return make
