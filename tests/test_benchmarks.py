"""Benchmarks run for hours and seldom: that what they import is still there is looked at here, without running them."""

import ast
import importlib
import pathlib

import pytest

FILES = sorted((pathlib.Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_a_benchmark_imports_of_the_library_is_there(file):
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module.split(".")[0] == "maskrl_jax":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}"), name
