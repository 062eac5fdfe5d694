"""What is imported is declared, with a lower bound that `make test-oldest` installs."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"fla": "flash-linear-attention", "yaml": "pyyaml"}  # where the import has another name
WITH_TORCH = {"triton"}  # on CUDA; elsewhere it is not there, and not needed
OF_TRANSFORMERS = {"jinja2"}  # which asks for it only when a chat template is rendered


def imports():
    """Top-level modules by file, of statements and of `import_module("...")`."""
    for path in sorted((ROOT / "src" / "ahn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
                names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            else:
                continue
            for name in names:
                module = name.partition(".")[0]
                if module not in sys.stdlib_module_names and module != "ahn":
                    yield path.relative_to(ROOT), module


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements):
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


CORE = names_of(PROJECT["dependencies"])
EXTRAS = names_of(name for extra in PROJECT["optional-dependencies"].values() for name in extra)


def test_imports_are_dependencies():
    undeclared = {
        f"{path}: {module}"
        for path, module in imports()
        if normal(PACKAGES.get(module, module)) not in CORE | EXTRAS | WITH_TORCH
    }
    assert not undeclared


def test_dependencies_are_imported():
    imported = {normal(PACKAGES.get(module, module)) for _, module in imports()}
    assert not CORE - OF_TRANSFORMERS - imported


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_dependencies_have_a_lower_bound(requirement):
    assert re.fullmatch(r"[\w.-]+(\[\w+\])?>=\d+(\.\d+)*", requirement)
