"""The commands that do a run again, for its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from vitprune.common import distributed
from vitprune.jobs.side_by_side import BENCH_BATCH_SIZES
from vitprune.jobs.sparsify import RunSettings
from vitprune.report.publishable import repeatable


def commands(arguments: Sequence[str], data: str, device: str, of_data: Mapping[str, object]) -> dict[str, str]:
    """Command lines by what they do, with `path/to/name` for paths that only this machine has.

    Args:
        arguments: of the command that trains, its name first.
        data: DATA.
        device: that was used.
        of_data: what else was said of DATA, by name of the option; None and False are left out.
    """
    world = distributed.world_size()
    start = ["vitprune"] if world == 1 else ["torchrun", "--nproc-per-node", str(world), "-m", "vitprune"]
    given = [data]
    for name, value in of_data.items():
        if value not in (None, False):
            given += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    how = ["--device", device, "--precision", RunSettings.eval_precision]
    sizes = ",".join(map(str, BENCH_BATCH_SIZES))
    return {
        arguments[0]: shlex.join([*start, *repeatable(arguments)]),
        "eval": shlex.join(["vitprune", "eval", ".", *repeatable(given), *how]),
        "bench": shlex.join(["vitprune", "bench", ".", "-b", sizes, *how]),
    }
