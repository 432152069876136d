"""Docstrings of what is public can be read by tools: sections of Google's style, which name every parameter, in order."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import moequant
from moequant import errors, gemm, nn, quantization, testing

MODULES = (
    "activations",
    "batch",
    "checkpoints",
    "config",
    "dense.gemm",
    "dense.int8",
    "dense.per_tensor",
    "dispatcher",
    "environment",
    "errors",
    "experts",
    "formats",
    "gemm",
    "group_quant",
    "models",
    "nn",
    "quantization",
    "send_recv",
    "testing.comparison",
    "testing.generators",
    "testing.one_process",
    "testing.ranks",
    "testing.recording",
    "weights",
    "workspaces",
)
SECTIONS = ("Attributes", "Args", "Returns", "Yields", "Raises")


def sections(docstring: str) -> dict[str, list[str]]:
    """The lines of each section, without their indentation, by its name; "" for what stands before."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in inspect.cleandoc(docstring).splitlines():
        if line.endswith(":") and line[:-1] in SECTIONS:
            name = line[:-1]
            assert name not in found, f"{name} twice"
            found[name] = []
        elif name and line.strip():
            assert line.startswith("    "), f"not indented below {name}: {line!r}"
            found[name].append(line[4:])
        elif not name:
            found[""].append(line)
    return found


def items(lines: list[str]) -> list[str]:
    """The names that a section explains: "name: text", with what goes on of it indented further."""
    names = []
    for line in lines:
        if not line.startswith("    "):
            match = re.match(r"(\*{0,2}\w+): \S", line)
            assert match, f"neither `name: text` nor indented below one: {line!r}"
            names.append(match[1])
    return names


def parameters(function: Callable[..., Any]) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    every = inspect.signature(function).parameters.values()
    return [stars.get(parameter.kind, "") + parameter.name for parameter in every if parameter.name not in ("self", "cls")]


def raises(function: Callable[..., Any]) -> bool:
    """Whether it has a raise statement of its own, or checks its arguments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    checks = any(isinstance(call, ast.Name) and re.match(r"_?check_", call.id) for call in calls)
    return checks or any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def public() -> Iterator[tuple[str, Any]]:
    """What the public modules define, and the public methods and properties of their classes, by name."""
    for module in (importlib.import_module(f"moequant.{name}") for name in MODULES):
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                yield f"{module.__name__}.{name}", value
                # inherited ones too, so far as they are ours
                members = [pair for base in value.__mro__ if base.__module__.startswith("moequant") for pair in vars(base).items()]
                for of_class, member in members:
                    plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                    is_public = of_class == "__call__" or not of_class.startswith("_")
                    if is_public and (inspect.isfunction(plain) or isinstance(plain, property)):
                        yield f"{module.__name__}.{name}.{of_class}", plain


PUBLIC = dict(public())


def check(name: str, value: Any) -> None:
    """Raises AssertionError, saying what is missing in the docstring."""
    assert value.__doc__, "no docstring"
    found = sections(value.__doc__)
    assert found[""] and found[""][0].strip(), "no first line"
    if isinstance(value, property):
        assert set(found) <= {"", "Raises"}
        return
    assert [line for line in found[""] if re.match(r"(\w+: |Returns |Raises )", line) and not line.startswith("Example")] == []
    for error in items(found.get("Raises", [])):
        assert error in vars(errors) or hasattr(builtins, error) or hasattr(testing, error), f"{error} is no exception"
    if inspect.isclass(value):
        fields = (
            [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
            if dataclasses.is_dataclass(value)
            else []
        )
        if fields:
            assert items(found.get("Attributes", [])) == fields
        elif "__init__" in vars(value):
            assert items(found.get("Args", [])) == parameters(value.__init__)
        return
    assert items(found.get("Args", [])) == parameters(value)
    returned = inspect.signature(value).return_annotation
    if str(returned).startswith("Iterator"):
        assert found.get("Yields"), "no Yields"
    else:
        assert bool(found.get("Returns")) == (returned not in ("None", None)), (
            "Returns where there is something to return, and only there"
        )
    if raises(value):
        assert found.get("Raises"), "it raises and has no Raises"


@pytest.mark.parametrize("name", PUBLIC)
def test_the_docstring_has_every_parameter_in_order_what_is_returned_and_what_is_raised(name):
    check(name, PUBLIC[name])


def test_all_that_is_listed_as_public_is_looked_at():
    listed = [getattr(module, name) for module in (moequant, quantization, gemm, nn, testing) for name in module.__all__]
    looked_at = {value.__module__ for value in PUBLIC.values() if not isinstance(value, property)}
    assert {value.__module__ for value in listed} <= looked_at


def documented(x: int, *rest: int, limit: int = 1) -> int:
    """One line.

    Args:
        x: a number,
            and more of it.
        *rest: others.
        limit: the largest.

    Returns:
        A number.

    Raises:
        ValueError: x is larger.
    """
    if x > limit:
        raise ValueError(x, rest)
    return x


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    *rest: others.\n", ""),
        ("*rest: others", "rest: others"),
        ("Returns:\n        A number.\n", ""),
        ("Raises:\n        ValueError: x is larger.\n", ""),
        ("ValueError: x", "NoSuchError: x"),
        ("    limit: the largest.\n", "limit: the largest.\n"),
        ("One line.", "limit: the largest."),
    ],
)
def test_a_docstring_that_misses_something_is_found(old, new, monkeypatch):
    check("documented", documented)
    assert documented.__doc__ and old in documented.__doc__
    monkeypatch.setattr(documented, "__doc__", documented.__doc__.replace(old, new))
    with pytest.raises(AssertionError):
        check("documented", documented)
