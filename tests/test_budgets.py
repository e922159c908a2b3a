"""How large the house may be. Whoever makes it smaller lowers the numbers; they are not for raising."""

from __future__ import annotations

import ast

from tests.imports import FILES, MODULES, ROOT, imports_of

MOST_LINES = 9_622  # of product code; the aim is 6,800
MOST_FILES, LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 70, 350, 60, 6


def test_the_house_is_no_larger_than_this() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert sum(lengths.values()) <= MOST_LINES and len(FILES) <= MOST_FILES
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE}


def test_a_function_fits_on_a_screen_and_takes_few_parameters() -> None:
    too_long, too_many = [], []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                if (node.end_lineno or node.lineno) - node.lineno >= LONGEST_FUNCTION:
                    too_long.append(place)
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                if len([name for name in names if name not in ("self", "cls")]) > MOST_PARAMETERS:
                    too_many.append(place)  # by position; what only a name can set is on top
    assert not too_long and not too_many


def test_no_module_imports_itself_by_way_of_others() -> None:
    imported = {module: imports_of(module) for module in MODULES}
    while free := [module for module, others in imported.items() if not others & imported.keys()]:
        for module in free:
            del imported[module]
    assert not imported
