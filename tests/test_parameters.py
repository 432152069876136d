"""What travels together is one argument: few functions have many parameters, and none has very many."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# functions with MANY parameters or more; parameters of one that is called on the host
MANY, MOST_FUNCTIONS, MOST_ON_HOST = 10, 15, 16
# the settings of a dispatcher, written out for whoever reads its signature
EXCEPTIONS = {"moequant/dispatcher.py: MoEQuantDispatcher.__init__"}


class Function(NamedTuple):
    """parameters: those of a class's own functions without `self`."""

    name: str
    parameters: int
    on_device: bool


def functions() -> list[Function]:
    """All of the package and its kernels, of classes and of functions too."""
    found: list[Function] = []

    def walk(node: ast.AST, path: str, inside: tuple[str, ...], in_class: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                decorators = [ast.unparse(decorator) for decorator in child.decorator_list]
                given = child.args
                names = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                bound = in_class and "staticmethod" not in decorators
                count = sum(name is not None for name in names) - bound
                name = f"{path}: {'.'.join((*inside, child.name))}"
                found.append(Function(name, count, any(".jit" in decorator for decorator in decorators)))
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            within = (*inside, child.name) if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else inside
            walk(child, path, within, isinstance(child, ast.ClassDef) if named else in_class)

    for folder in ("kernels", "moequant"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.is_relative_to(ROOT / "moequant" / "kernels"):
                walk(ast.parse(path.read_text()), path.relative_to(ROOT).as_posix(), (), False)
    return found


def test_few_functions_have_many_parameters():
    many = [function for function in functions() if function.parameters >= MANY]
    assert len(many) <= MOST_FUNCTIONS, "\n".join(map(str, many))


def test_no_function_of_the_host_has_very_many():
    most = {function.name for function in functions() if not function.on_device and function.parameters > MOST_ON_HOST}
    assert most <= EXCEPTIONS


def test_both_kinds_of_functions_are_counted():
    """Kernels, with what Triton and Gluon compile, and what the host runs: a rule that sees none of them would always hold."""
    parameters = {function.name: function for function in functions()}
    assert parameters["kernels/library/symmetric.py: wait_for_peers"] == ("kernels/library/symmetric.py: wait_for_peers", 5, True)
    assert parameters["kernels/symmetric/push_tokens.py: push_tokens_kernel"].on_device
    assert parameters["moequant/transport/base.py: Slot.take"] == ("moequant/transport/base.py: Slot.take", 1, False)
