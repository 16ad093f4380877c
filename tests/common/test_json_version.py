"""Files of version 1 are read in the words of version 2."""

from vitprune.common.json_version import SCHEMA_VERSION, upgraded


def test_old_keys_and_values_get_their_new_names_at_any_depth():
    old = {
        "schema_version": 1,
        "dropped": "fold",
        "wall_s": 3.5,
        "training": {"phases": {"warm": 80, "deployed": 2}, "recipe": {"dropped": "fold", "warm_start_steps": 80}},
        "target": {"promised_speedup": 1.5},
        "classes": [{"name": "warm"}, {"name": "fold"}],
    }
    assert upgraded(old) == {
        "schema_version": SCHEMA_VERSION,
        "pruned": "merge",
        "seconds": 3.5,
        "training": {
            "phases": {"pretraining": 80, "deployed": 2},
            "recipe": {"pruned": "merge", "pretraining_steps": 80},
        },
        "target": {"predicted_speedup": 1.5},
        "classes": [{"name": "warm"}, {"name": "fold"}],
    }
    assert upgraded({"step": 1, "phase": "warm"}) == {"step": 1, "phase": "pretraining"}


def test_files_of_this_version_and_what_is_no_object_stay_as_they_are():
    for content in ({"schema_version": 2, "wall_s": 1}, [1], None, "text"):
        assert upgraded(content) == content
