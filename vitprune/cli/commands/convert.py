"""`vitprune convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitprune.cli.options import AsJson, option, parse_numbers
from vitprune.cli.output import number, print_json, print_line
from vitprune.cli.progress import RunProgress


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="An official DynamicViT checkpoint, a .pth file.", show_default=False)
    ],
    keep: Annotated[
        float | None,
        option(
            "Share of patch tokens that one stage keeps, in (0, 1), which the file does not say.",
            metavar="RATIO",
            shown=False,
        ),
    ] = None,
    stages: Annotated[
        str | None, option("Blocks before which its predictors act.", "--prune-at", metavar="BLOCKS", shown="by depth")
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "What to write; config.json goes beside it.",
            "--output",
            "-o",
            metavar="FILE",
            shown="runs/<model>-keep<ratio>/model.safetensors",
        ),
    ] = None,
    overwrite: Annotated[bool, option("Write over an --output that exists.", "--overwrite")] = False,
    as_json: AsJson = False,
) -> None:
    """An official DynamicViT checkpoint, DeiT or LV-ViT, as a model.safetensors for all other commands.

    The architecture is read off the shapes of its tensors. Nothing in it is run as code.

    Examples:

      vitprune convert dynamicvit_deit_s.pth --keep 0.7 -o model.safetensors

      vitprune convert dynamicvit_lvvit_m.pth --keep 0.8 --prune-at 5,10,15
    """
    blocks = parse_numbers(stages, "--prune-at")

    from vitprune.checkpoint.sparse_file import save
    from vitprune.common.run_folder import RunFolder, check_file_is_new
    from vitprune.loading.dynamicvit import load_official
    from vitprune.measure import count_params, describe_plan

    if output is not None:
        check_file_is_new(output, overwrite=overwrite)
    sparse, metadata = load_official(checkpoint, keep, blocks, RunProgress())
    needed = 4 * count_params(sparse)
    if output is None:
        with RunFolder.choose(None, f"{metadata.model}-keep{metadata.keep:g}").claimed(needed) as folder:
            output = folder.weights
            save(sparse, output, metadata)
    else:
        RunFolder(output.parent).create(needed)
        save(sparse, output, metadata)
    result = describe_plan(sparse, metadata.model) | {"origin": metadata.origin, "output": str(output)}
    if as_json:
        print_json(result)
        return
    places = ", ".join(f"{stage.num_tokens} before block {stage.block}" for stage in metadata.stages)
    print_line(
        f"{metadata.model}, {metadata.label}: {number(result['sparse']['params_m'], 3)} M parameters, "
        f"{number(result['sparse']['gmacs'], 3)} GMACs; of {metadata.num_patches} patch tokens are left: {places}"
    )
    print_line(f"written to {output}")
