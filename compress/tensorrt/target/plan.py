"""A plan on disk: the file beside it that vouches for it, the lock of who builds it, and the cache of kernel timings.

A plan is native code. One is only ever deserialized if this program wrote it: the sidecar beside it has its SHA-256,
and names the GPU, TensorRT, driver and graph that it was built for. That guards against damaged, foreign and mixed-up
files; who can write to the folder can write a sidecar, too.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

PLAN = "model.plan"
SCHEMA = 1
WRITER = "speech-compress"

SAID = {  # of a key's parts, in the order in which they are told
    "tensorrt": "TensorRT",
    "gpu": "the GPU",
    "compute_capability": "the compute capability",
    "driver": "the driver",
    "graph_sha256": "the graph",
    "precision": "the precision",
    "profile": "the optimization profile",
    "float_nodes": "the choice of FP32 nodes",
}

Key = Mapping[str, Any]


class PlanError(Exception):
    """A plan that is not to be loaded: why, and what to do."""


def sidecar_of(plan: Path) -> Path:
    """The file that vouches for a plan."""
    return plan.with_name(f"{plan.name}.json")


def write_plan(plan: Path, data: bytes, key: Key, about: Mapping[str, Any]) -> None:
    """Write a plan and its sidecar; the sidecar last, so that a killed process leaves no plan that is believed.

    Args:
        key: What it was built for; see ``SAID``.
        about: What else is worth recording.
    """
    sidecar_of(plan).unlink() if sidecar_of(plan).exists() else None
    write_file(plan, data)
    record = {"schema": SCHEMA, "written_by": WRITER, "sha256": sha256(data), "key": dict(key), **about}
    write_file(sidecar_of(plan), (json.dumps(record, indent=2) + "\n").encode())


def read_sidecar(plan: Path) -> dict[str, Any]:
    """What is recorded of a plan.

    Raises:
        PlanError: If there is no plan, or no sidecar of ours beside it.
    """
    if not plan.is_file():
        raise PlanError(f"{plan}: no such file. Build it: python build_engine.py")
    try:
        record = json.loads(sidecar_of(plan).read_text(encoding="utf-8"))
        ours = record["written_by"] == WRITER and record["schema"] == SCHEMA and isinstance(record["key"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise PlanError(
            f"{plan} was not built here: {sidecar_of(plan).name} beside it is missing or not this program's. A plan is"
            " native code, so foreign ones are not loaded. Build it here: python build_engine.py"
        )
    return dict(record)


def read_plan(plan: Path) -> tuple[bytes, dict[str, Any]]:
    """Read a plan that may be deserialized, and its record.

    Raises:
        PlanError: If it is foreign or damaged.
    """
    record = read_sidecar(plan)
    data = plan.read_bytes()
    if sha256(data) != record.get("sha256"):
        raise PlanError(
            f"{plan} is damaged or was exchanged: its SHA-256 is not the one in {sidecar_of(plan).name}. It is not"
            " loaded. Build it again: python build_engine.py --force"
        )
    return data, record


def differences(recorded: Key, present: Key) -> list[str]:
    """In what a plan's key differs from what is here, in words; empty if it may be used."""
    found = []
    for part, words in SAID.items():
        old, new = recorded.get(part), present.get(part)
        if old == new:
            continue
        short = part in ("graph_sha256", "profile", "float_nodes")
        found.append(f"{words} is another one" if short else f"{words} was {old} and is {new}")
    return found


def why_build(plan: Path, present: Key) -> str | None:
    """Why a plan has to be built, or None where the one that is there can stay."""
    if not plan.exists():
        return "there is none yet"
    try:
        _, record = read_plan(plan)
    except PlanError:
        return "the one that is there is damaged or foreign"
    changed = differences(record["key"], present)
    return "; ".join(changed) if changed else None


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=str(path.parent))
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def sha256(data: bytes) -> str:
    """Hash bytes; hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Hash a file; hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def lock(plan: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time build a plan. The lock ends with the process, however that ends.

    Args:
        waiting: Called once if another one holds it.
    """
    with plan.with_name(f".{plan.name}.lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def cache_name(identity: Key) -> str:
    """Of the timing cache: timings hold for one GPU and TensorRT."""
    parts = json.dumps([identity.get(part) for part in ("tensorrt", "gpu", "compute_capability")])
    return f"timing-{sha256(parts.encode())[:12]}.cache"


def read_cache(path: Path) -> tuple[bytes, str | None]:
    """Timings of earlier builds, empty where there are none, and what is wrong with the file if something is.

    Its first 32 bytes are the SHA-256 of the rest: TensorRT reads timings in native code, too.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b"", None
    except OSError as error:
        return b"", f"the timing cache {path} cannot be read ({error.strerror}); building without it."
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        return b"", f"the timing cache {path} is damaged; building without it."
    return data, None


def write_cache(path: Path, data: bytes) -> str | None:
    """Keep timings for later builds; what went wrong is told and costs nothing but time then."""
    try:
        write_file(path, hashlib.sha256(data).digest() + data)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = f"no space for {len(data) >> 10} KiB" if full else str(error.strerror)
        return (
            f"the timing cache {path} was not written: {why}. The engine is good; the next build takes as long again."
        )
    return None
