"""Write the table of timm's architectures that `vitprune models` answers from: what each costs, or why not.

    python examples/describe_architectures.py

builds every architecture of the installed timm, without weights, and writes vitprune/loading/architectures.json. It is
to be run again for another timm, or when a family, the default plan or the predictors change; `pytest -m slow
tests/backbones/test_coverage.py` says when. It takes several minutes, less with --costs-only, where what can be
pruned is the same as before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm

from vitprune.common.files import write_text
from vitprune.loading.architectures import TABLE, shipped_table, table_text
from vitprune.loading.names import describe_architecture
from vitprune.training.recipe import load_recipe


def main() -> None:
    """Describe all architectures, or those that match a pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--only", default="", help="timm's wildcard, to try it")
    parser.add_argument("--costs-only", action="store_true", help="take over what is refused from the table there is")
    arguments = parser.parse_args()
    known = shipped_table().rows if arguments.costs_only else {}
    plan = load_recipe("short").plan_defaults
    names = timm.list_models(arguments.only)
    rows = []
    for name in names:
        refused = name in known and known[name]["reason"] is not None
        rows.append(known[name] if refused else describe_architecture(name, plan))
        print(f"{len(rows)} of {len(names)}: {name}", end="\r", flush=True)
    write_text(arguments.output, table_text(timm.__version__, rows))
    supported = sum(row["reason"] is None for row in rows)
    print(f"\n{supported} of {len(rows)} architectures can be sparsified; written to {arguments.output}")


if __name__ == "__main__":
    main()
