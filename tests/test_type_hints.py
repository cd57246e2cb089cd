"""Public functions of the root modules and of lib have type hints; mypy checks that they fit together."""

import ast

import pytest
from conftest import ROOT


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")]), ids=lambda path: path.name)
def test_public_functions_have_type_hints(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert not [a.arg for a in arguments if a.annotation is None], f"{node.name}, line {node.lineno}"
            assert node.returns is not None, f"{node.name}, line {node.lineno}: what does it return?"
