"""What a model's outputs mean is the tasks' business: nobody else takes a softmax or the largest of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2] / "vitprune"
ROOMS = ("evaluation.py", "training", "report", "jobs", "cli", "export", "api", "measure")
OF_TOKENS = {
    "training/pretraining.py": 1,  # the share of saliency that a token's score claims
}


def test_softmax_and_argmax_over_outputs_are_in_tasks_alone():
    found = {}
    for room in ROOMS:
        files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
        assert files
        for file in files:
            count = len(re.findall(r"\.(?:log_)?(?:softmax|argmax)\(", file.read_text(encoding="utf-8")))
            if count:
                found[str(file.relative_to(ROOT))] = count
    assert found == OF_TOKENS
