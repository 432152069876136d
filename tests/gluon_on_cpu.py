"""Runs the Hopper kernels' own source on a CPU, so that what they load and store can be seen without a GPU.

Triton's interpreter knows no Gluon. Here each `gluon.jit` function is compiled as plain Python, with stand-ins for the names that it
calls (`gluon_names.py`).
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_names import Language, Matrix, Memory, Pointer, hopper_names
from moequant.kernels.library.launch import Launchable


class Source(ast.NodeTransformer):
    """Makes a Gluon function's source plain Python: numbers have no `.to`, tensors no `.type.layout`."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return ast.Call(ast.Name("convert", ast.Load()), [node.func.value, *node.args], node.keywords)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "layout" and isinstance(node.value, ast.Attribute) and node.value.attr == "type":
            return ast.Constant(None)
        return node


def plain(module: ModuleType, names: dict[str, Any], made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A module's names, with its Gluon functions as plain ones."""
    if module.__name__ in made:
        return made[module.__name__]
    namespace = made[module.__name__] = {**vars(module), **names}
    for name, found in vars(module).items():
        value = found.kernel if isinstance(found, Launchable) else found
        if isinstance(value, gl.constexpr):
            namespace[name] = value.value
        elif type(value).__name__ == "GluonJITFunction" and name not in names:
            home = inspect.getmodule(value.fn)
            assert home is not None
            if home is module:
                tree = ast.fix_missing_locations(Source().visit(ast.parse(textwrap.dedent(inspect.getsource(value.fn)))))
                flags = __future__.annotations.compiler_flag
                exec(compile(tree, f"{module.__file__}:{name}", "exec", flags), namespace)
            else:
                namespace[name] = plain(home, names, made)[name]
    return namespace


class StandIn:
    """Takes a Gluon kernel's place in its module: launched in the same way, it runs the programs one after the other."""

    def __init__(self, kernel: Any, memory: Memory) -> None:
        module = inspect.getmodule(kernel.fn)
        assert module is not None
        self.memory, self.language = memory, Language(memory)
        self.parameters = inspect.signature(kernel.fn).parameters
        self.function = plain(module, {"gl": self.language, **hopper_names(memory)}, {})[kernel.fn.__name__]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            for argument in arguments:
                parts = argument if isinstance(argument, tuple) else (argument,)
                self.memory.tensors += [part for part in parts if isinstance(part, Tensor)]
            given = [self._argument(argument) for argument in arguments]
            self.language.programs = grid[0]
            for self.language.program in range(grid[0]):
                self.function(*given, **{name: value for name, value in constants.items() if name in self.parameters})

        return launch

    @classmethod
    def _argument(cls, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return Pointer(torch.tensor(argument.data_ptr()), argument.dtype)
        if isinstance(argument, TensorDescriptor):
            return Matrix(argument)
        if isinstance(argument, gl.constexpr):
            return argument.value
        if isinstance(argument, tuple):
            parts = map(cls._argument, argument)
            return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
        return torch.tensor(argument, dtype=torch.int32) if isinstance(argument, int) else argument
