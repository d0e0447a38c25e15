"""Files that are whole or not there: everything is written under a temporary name and renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import CompressError, InputError, MachineError

CACHE_VARIABLE = "COMPRESS_CACHE"
KEPT_DAYS = 30  # what was not read from the cache folder for so long is removed

_DIGEST = 64  # characters of the SHA-256 that a kept file begins with


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it takes the place of ``path`` when the block ends well.

    Raises:
        MachineError: If the disk is full or the folder cannot be written.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; it takes the place of ``path`` when the block ends well.

    Raises:
        MachineError: If the disk is full or the folder cannot be written.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        new, older = workplace / "new", workplace / "older"
        try:
            new.mkdir()
            yield new
            if path.is_dir():  # a folder cannot replace one that is not empty
                path.replace(older)
            new.replace(path)
        finally:
            if older.is_dir() and not path.exists():
                older.replace(path)  # the new one did not get there
            shutil.rmtree(workplace, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Tell whether a path is a temporary name of this module, left by a process that was killed while writing."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def remove_temporary(path: Path) -> None:
    """Remove what a killed process left."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a log.

    Raises:
        MachineError: If the disk is full or the file cannot be written.
    """
    with _disk_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: If it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None


def sha256_of(data: bytes | Path) -> str:
    """Hash bytes or a file; hexadecimal."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as stream:
        digest = hashlib.sha256()
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def cache_folder(kind: str) -> Path | None:
    """Where things of a kind are kept: in ``$COMPRESS_CACHE``, or the user's cache folder; None if that is ``off``."""
    chosen = os.environ.get(CACHE_VARIABLE, "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen) / kind
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "compress" / kind


def read_kept(path: Path) -> bytes | None:
    """Read what :func:`keep` wrote; None if it is not there or damaged."""
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    kept = data[_DIGEST:]
    return kept if sha256_of(kept).encode() == data[:_DIGEST] else None


def keep(path: Path, data: bytes) -> None:
    """Keep data, and remove what nobody reads any more; without a writable folder or space, do nothing."""
    with contextlib.suppress(CompressError, OSError):
        with replaced_file(path) as temporary:
            temporary.write_bytes(sha256_of(data).encode() + data)
        old = time.time() - KEPT_DAYS * 24 * 3600
        for other in path.parent.glob(f"*{path.suffix}"):
            if other.stat().st_mtime < old:
                other.unlink()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MachineError(f"disk full while writing {path}. Free some space, then try again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise MachineError(f"{path} cannot be written ({error.strerror}). Choose another place.") from error
        raise
