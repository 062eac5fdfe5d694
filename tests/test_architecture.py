"""Rules of docs/architecture.md that import-linter does not know: the face, and the number of parameters."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST = 6  # parameters of a function
MORE = {  # and why
    "adapter.py: from_pretrained",  # public, mostly options
    "engine/batch.py: __init__",  # public
    "engine/prefill.py: read",  # public
    "hf/hooks.py: attention_function",  # as transformers calls it
    "ops/chunked.py: gated_delta_rule",  # the recurrence, letter by letter
    "ops/fla.py: gated_delta_rule",  # as the library has it
    "recall/ask.py: ask",  # public, mostly options
    "recall/ask.py: find",  # public
}


def from_the_face(code):
    """Imports of `ahn` itself, line by line. Modules inside it are no part of the face: `from ahn import files`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):  # without "as", `import ahn.files` gives the name `ahn` too
            bad = any(
                alias.name.split(".")[0] == "ahn" and (alias.name == "ahn" or not alias.asname) for alias in node.names
            )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bad = node.module == "ahn" and any(not is_module(alias.name) for alias in node.names)
        else:
            bad = isinstance(node, ast.ImportFrom)  # relative: say from where
        if bad:
            yield ast.unparse(node)


def is_module(name):
    return any((ROOT / "src" / "ahn" / place).is_file() for place in (f"{name}.py", f"{name}/__init__.py"))


def test_nothing_inside_imports_the_face():
    files = sorted((ROOT / "src" / "ahn").rglob("*.py"))
    found = [f"{path}: {line}" for path in files[1:] for line in from_the_face(path.read_text())]
    assert files[0].name == "__init__.py" and not found


@pytest.mark.parametrize(
    ("code", "is_of_the_face"),
    [
        ("import ahn", True),
        ("def run():\n    import ahn.files", True),
        ("from ahn import files, augment", True),
        ("from . import files", True),
        ("from ahn import files, cells", False),
        ("import ahn.files as files, os", False),
        ("from ahn.hf.augment import augment", False),
    ],
)
def test_an_import_of_the_face_is_seen(code, is_of_the_face):
    assert bool(list(from_the_face(code))) == is_of_the_face


def test_functions_take_few_parameters():
    """Kernels aside, whose tensors are given as pointers and strides."""
    folder, found = ROOT / "src" / "ahn", set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.parent.name != "kernels" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                if count + bool(given.vararg) + bool(given.kwarg) > MOST:
                    found.add(f"{path.relative_to(folder).as_posix()}: {node.name}")
    assert found <= MORE
