"""Recipes of anything: refused, or settings of the right types."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ahn.train import recipe
from damage import damaged, edits, values
from effort import bounded, fuzz

pytestmark = pytest.mark.slow

GOOD = {
    "base": "base",
    "output": "run",
    "data": ["a.txt", "b.jsonl"],
    "lossless": [512, 1024],
    "sinks": [0, 64],
    "store": "learned",
    "store_size": 8,
    "gate_steps": 10,
    "lr": 1e-3,
    "limit": None,
    "compile": False,
    "report_to": [],
}
KEYS = [field.name for field in dataclasses.fields(recipe.Recipe)]
TEXT = yaml.safe_dump(GOOD).encode()
# Words that mean something in YAML, in any order.
words = st.sampled_from([
    *"a:[]{}#%~\t\x00é'", '"', "\n", "\n  ", ": ", "- ", "? ", ", ", "&a ", "*a", "<<", "|\n", "---", "null", ".inf",
    "!!binary ", "!!python/object:os.system ", "2020-01-01", "0x1F", "1e3",
])  # fmt: skip


def check(text, folder, changes=()):
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    with bounded(folder) as refused:
        found = recipe.load(path, changes)
    if not refused:
        assert dataclasses.replace(found) == found
        assert all(isinstance(source, str) for source in found.data)
        json.dumps(dataclasses.asdict(found))  # it is saved beside the result


@fuzz(100)
@given(st.data())
def test_values(tmp_path, data):
    settings = data.draw(edits(GOOD) | values)
    if isinstance(settings, dict):
        settings |= data.draw(st.dictionaries(st.sampled_from(KEYS), values, max_size=2))
    check(json.dumps(settings).encode(), tmp_path)


@fuzz(100)
@given(st.data())
def test_text(tmp_path, data):
    some = st.lists(words, max_size=30).map(lambda found: "".join(found).encode())
    check(data.draw(damaged(TEXT) | some | st.binary(max_size=60)), tmp_path)


@fuzz(50)
@given(key=st.sampled_from(KEYS) | st.text(max_size=8), value=st.lists(words, max_size=6).map("".join))
def test_changes(tmp_path, key, value):
    check(TEXT, tmp_path, [f"{key}={value}"])


def test_aliases_of_aliases(tmp_path):
    """500 bytes that stand for gigabytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    check(("\n".join(lines) + "\ndata: *a11\n").encode(), tmp_path)
    check(f"base: b\noutput: o\ndata: {'[' * 5000}".encode(), tmp_path)
