"""`vitprune info`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from vitprune.cli.model_options import StructureOptions
from vitprune.cli.options import AsJson, Model, RecipeName
from vitprune.cli.output import number, print_json, print_line, print_table, waiting
from vitprune.cli.plan_options import Align, MacsOptions, open_as_asked, resolve_plan, say_middle
from vitprune.schedule import keep_in_words


def info(
    model: Model,
    plan: MacsOptions,
    structure: StructureOptions,
    align: Align = 1,
    recipe: RecipeName = None,
    as_json: AsJson = False,
) -> None:
    """The plan before acting: tokens per stage, MACs and parameters. Nothing runs; needs no weights and no network.

    Examples:

      vitprune info deit_small --keep 0.7

      vitprune info runs/deit_small_patch16_224-keep0.7/model.safetensors
    """
    with waiting("loading PyTorch"):
        from vitprune.measure import describe_plan
        from vitprune.model import attach_as
        from vitprune.training.recipe import default_recipe, load_recipe
    settings = load_recipe(recipe or default_recipe(structure.task))
    request = plan.request(align=align)
    loaded = structure.load(model, weights="none")
    if loaded.sparse:
        open_as_asked(loaded, request)
        sparse = loaded.sparse
    else:
        sparsity, _ = resolve_plan(request, loaded.model, settings)
        say_middle(sparsity)
        sparse = attach_as(loaded.model, sparsity)
        sparse.task = loaded.task
    result = describe_plan(sparse, loaded.name)
    if loaded.metadata is not None:
        result |= {"accuracy": loaded.metadata.accuracy, "origin": loaded.metadata.origin}
    if as_json:
        print_json(result)
        return
    _print(result)


def _print(result: dict[str, Any]) -> None:
    size = "x".join(map(str, result["input_size"]))
    print_line(f"{result['model']}: {size}, {result['depth']} blocks, {_outputs(result)}")
    bounds = [0, *(stage["block"] for stage in result["stages"]), result["depth"]]
    counts = [result["num_patches"], *(stage["num_tokens"] for stage in result["stages"])]
    rows = [
        [f"{first}-{end - 1}", str(count), number(100 * count / result["num_patches"], 1)]
        for (first, end), count in zip(pairwise(bounds), counts, strict=True)
    ]
    print_table(
        f"patch tokens, beside {result['num_prefix_tokens']} prefix token(s)", ["blocks", "tokens", "% of all"], rows
    )
    if result["keep"] is not None and result["stages"]:
        print_line(keep_in_words(result["keep"], result["schedule"], counts[0], counts[1:]))
        print_line(f"pruned tokens are {'merged into kept ones' if result['pruned'] == 'merge' else 'dropped'}")
    if result.get("origin"):
        print_line(f"made from the weights {result['origin']['source']}")
    dense, sparse = result["dense"], result["sparse"]
    costs = {"GMACs": "gmacs", "parameters (M)": "params_m"}
    rows = [[name, number(dense[key], 3), number(sparse[key], 3)] for name, key in costs.items()]
    print_table("cost of one image", ["", "dense", "sparse"], rows)
    print_line(f"{result['delta']['gmacs_pct']:+.1f} % multiply-accumulates (attention and predictors counted)")
    if accuracy := result.get("accuracy"):
        _print_accuracy(result["task"], accuracy)


def _print_accuracy(task: Any, accuracy: dict[str, Any]) -> None:
    """What the file says was measured."""
    from vitprune.tasks import task_named, zero_shot_task

    images = f"{accuracy['sparse']['num_images']} images of {accuracy['data']['name']}"
    for figure in dict.fromkeys((*task_named(task).accuracy[:1], *zero_shot_task().accuracy[:1])):
        sparse, dense = (accuracy[side].get(figure.key) for side in ("sparse", "dense"))
        if sparse is not None:
            digits = figure.digits
            print_line(f"measured {figure.text}: {sparse:.{digits}f}, dense {dense:.{digits}f}, on {images}")
    figure = task_named(task).fidelity[0]
    value = accuracy.get("fidelity", {}).get(figure.key)  # older files do not say
    if value is not None:
        print_line(f"measured {figure.text}: {value:.{figure.digits}f}, on {images}")


def _outputs(result: dict[str, Any]) -> str:
    """What the model gives, in words."""
    task, count = result["task"], result["num_classes"]
    return f"{count} classes" if task == "classification" else f"{task}, {count} outputs" if count else str(task)
