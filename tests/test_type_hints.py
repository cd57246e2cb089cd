"""Public functions of the root modules say what they take and what they give; mypy checks that it fits together."""

import ast

import pytest
from conftest import ROOT


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_public_functions_have_type_hints(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert not [a.arg for a in arguments if a.annotation is None], f"{node.name}, line {node.lineno}"
            assert node.returns is not None, f"{node.name}, line {node.lineno}: what does it return?"


def test_all_root_modules_are_checked_and_measured():
    names = sorted(path.name for path in ROOT.glob("*.py"))
    for file, key in (("mypy.ini", "files ="), (".coveragerc", "include =")):
        (line,) = [line for line in (ROOT / file).read_text().splitlines() if line.startswith(key)]
        assert sorted(name.strip() for name in line.removeprefix(key).split(",")) == names, file
