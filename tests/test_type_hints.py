"""Public functions of the root modules, lib and lib/datasets have type hints; mypy checks that they fit together."""

import ast

import pytest
from conftest import ROOT

PATHS = sorted(path for folder in (".", "lib", "lib/datasets") for path in ROOT.glob(f"{folder}/*.py"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_functions_have_type_hints(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert not [a.arg for a in arguments if a.annotation is None], f"{node.name}, line {node.lineno}"
            assert node.returns is not None, f"{node.name}, line {node.lineno}: what does it return?"
