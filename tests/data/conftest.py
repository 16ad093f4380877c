import datasets
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """datasets keeps nothing of a test for the next one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
