"""Files of keys and values."""

import pytest

from ahn import yaml_file
from ahn.errors import ConfigError


def test_a_file_of_keys(tmp_path):
    (tmp_path / "a").write_text("x: 1\ny: 2")
    assert yaml_file.read(tmp_path / "a", "suite", ["y=[3]"]) == {"x": 1, "y": [3]}
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="expected a suite saved as UTF-8"):
        yaml_file.read(tmp_path / "b", "suite")
