"""Files are written whole or not at all, and only where a regular file is or can be.

Unfinished files and folders are named after the machine and the process that write them. The next process that writes
into the same folder removes those of a killed one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from ahn.errors import OutputError

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_UNFINISHED = re.compile(r"\.ahn-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
_KINDS = [(stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket")]


def checked(path: str | os.PathLike[str], option: str = "") -> Path:
    """The regular file that `path` names, with links followed. It exists, or it can be made.

    Args:
        option: the command line's option that gave the path, for messages.

    Raises:
        OutputError: the name has line ends or other control characters; the file exists and is not regular, or is
            read-only; or its folder is missing.
    """
    name = f"{option} {path}".strip()
    if any(unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in os.path.basename(os.fsdecode(path))):
        raise OutputError(
            f"{option} {os.fsdecode(path)!r}".strip() + ": cannot be written: the name has control characters"
        )
    try:
        file = Path(os.path.realpath(path))
        kind = file.lstat() if os.path.lexists(file) else None
        with suppress(FileNotFoundError):
            kind = os.stat(path)  # the real path of an open pipe, such as /dev/stdout, does not exist
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OutputError(f"{name}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if kind is not None and not stat.S_ISREG(kind.st_mode):
        found = next((found for test, found in _KINDS if test(kind.st_mode)), "device")
        raise OutputError(f"{name}: is a {found}; expected a file name")
    if kind is not None and not os.access(file, os.W_OK):
        raise OutputError(f"{name}: is read-only; expected a file that can be written")
    if not os.fspath(path) or not file.parent.is_dir():
        raise OutputError(f"{name}: cannot be written: no folder {Path(path).parent}")
    return file


def check_writable(path: str | os.PathLike[str] | None, option: str = "-o") -> None:
    """Raises OutputError if `path` cannot be written: users learn it before hours of work, not after."""
    if path is None:
        return
    file = checked(path, option)
    try:
        _sweep(file.parent)
        _new(file.parent).unlink()
    except OSError as error:
        raise OutputError(f"{option} {path}: cannot be written: {error.strerror}") from error


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path. It replaces the file at `path` if all goes well, and is removed if not.

    Raises:
        OutputError: `path` is no regular file, or the disk refused (full, read-only, no such folder). The earlier file
            is untouched.
    """
    file = checked(path)
    temporary = None
    try:
        _sweep(file.parent)
        temporary = _new(file.parent)
        mode = temporary.stat().st_mode
        yield temporary
        # a writer may have put another file there, for its owner alone
        temporary.chmod(stat.S_IMODE(file.stat().st_mode if file.exists() else mode))
        to_disk(temporary)
        temporary.replace(file)
        with suppress(OSError):  # not on every system
            to_disk(file.parent)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OutputError(f"{path}: cannot be written: {error}") from error
        raise


@contextmanager
def appending(path: Path, end: int, inode: int) -> Iterator[BinaryIO | None]:
    """Open a file of `end` bytes to append to it, unbuffered. If anything goes wrong, what was appended is cut off.

    Yields:
        the file; None if it changed (another inode or size), or if another process is appending to it.

    Raises:
        OutputError: the disk refused.
    """
    try:
        with path.open("r+b", buffering=0) as file:  # a buffer would be written when the file is closed
            alone, status = _lock(file), os.fstat(file.fileno())
            if not alone or (status.st_ino, status.st_size) != (inode, end):
                yield None
                return
            try:
                yield file
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def _lock(file: BinaryIO) -> bool:
    """Lock the file until it is closed. False if another process has locked it."""
    try:
        import fcntl
    except ImportError:  # not on every system
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # any other error: this file system has no locks
    return True


@contextmanager
def claimed(path: str | os.PathLike[str], option: str = "-o") -> Iterator[None]:
    """Claim a path among the processes of this machine: of two that rewrite one file, one would lose its work.

    Raises:
        OutputError: another process has claimed the path.
    """
    from filelock import FileLock, Timeout

    name = hashlib.sha256(os.path.realpath(path).encode(errors="surrogateescape")).hexdigest()[:24]
    user = os.getuid() if hasattr(os, "getuid") else ""
    lock = FileLock(Path(tempfile.gettempdir()) / f"ahn-{user}-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"{option} {path}: another process is writing to it; expected another name") from None
    except OSError:  # locks cannot be made here
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, removed at the end. `folder` is made if it is missing. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = folder / _name()
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _name() -> str:
    return f".ahn-{_HOST}-{os.getpid()}-{token_hex(4)}"


def _new(folder: Path) -> Path:
    """Make an empty file with default permissions."""
    path = folder / _name()
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def to_disk(path: Path) -> None:
    """Put the bytes of a file on disk, or the names in a folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove the unfinished files and folders of processes of this machine that have ended."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _UNFINISHED.fullmatch(entry.name)
            if match is None or match[1] != _HOST or _lives(int(match[2])):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(entry.path)


def _lives(process: int) -> bool:
    if os.name != "posix":  # on Windows signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return True
