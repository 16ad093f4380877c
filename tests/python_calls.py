"""Whether code that is only shown calls what there is."""

import ast
import inspect

import vitprune


def check_calls(code):
    """Every `vitprune.name(...)` in `code` exists and takes these arguments, settings of a recipe included.

    Returns:
        The names called.
    """
    tree, called = ast.parse(code), set()
    dicts = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name)
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "vitprune":
            given = {}
            for keyword in call.keywords:
                given |= {keyword.arg: keyword.value} if keyword.arg else dicts[keyword.value.id]
            bound = inspect.signature(getattr(vitprune, call.func.attr)).bind(*call.args, **given)
            assert set(bound.arguments.get("settings", ())) <= set(vitprune.Recipe.model_fields), ast.unparse(call)
            called.add(call.func.attr)
    return called
