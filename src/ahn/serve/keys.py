"""API keys. Only their hashes are kept: a line `NAME HASH` each in a file.

A key is 256 random bits, so one round of SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from ahn.errors import ConfigError
from ahn.serve.errors import ApiError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_HASH = re.compile(r"[0-9a-f]{64}")


class Keys:
    """The keys of a file. Raises ConfigError if it cannot be read, is empty, or has other lines."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--keys {path}: cannot be read: {getattr(error, 'strerror', error)}") from error
        self._hashes: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            name, _, digest = line.strip().partition(" ")
            if not line.strip():
                continue
            if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest) or name in self._hashes:
                raise ConfigError(f"--keys {path}: line {number}: expected NAME HASH, each name once")
            self._hashes[name] = digest
        if not self._hashes:
            raise ConfigError(f"--keys {path}: has no keys; expected one, as of ahn serve --keys {path} --new-key NAME")

    @property
    def names(self) -> list[str]:
        return list(self._hashes)

    def owner(self, header: str) -> str:
        """The name of the key in an Authorization header. All keys are compared, each in constant time.

        Raises:
            ApiError: 401.
        """
        kind, _, key = header.partition(" ")
        digest, found = _hash(key.strip()), None
        for name, kept in self._hashes.items():
            if hmac.compare_digest(digest, kept):
                found = name
        if found is None or kind.lower() != "bearer":
            raise ApiError(401, "Authorization: expected Bearer and a valid API key", code="invalid_api_key")
        return found


def add_key(path: str | os.PathLike[str], name: str) -> str:
    """A new key, whose hash is added to the file. Raises ConfigError if the name is taken or none, OSError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--new-key {name}: expected letters, digits, - and _, at most 63")
    if Path(path).exists() and Path(path).stat().st_size and name in Keys(path).names:
        raise ConfigError(f"--new-key {name}: {path} has a key of this name; expected another one")
    key = f"ahn-{secrets.token_urlsafe(32)}"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"{name} {_hash(key)}\n")
        file.flush()
        os.fsync(file.fileno())
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
