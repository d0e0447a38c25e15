"""Files are whole or not there; what the disk refuses is told."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import InputError, MachineError
from compress.files import read_json, replaced_file, replaced_folder, sha256_of, write_json, write_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(data=st.binary(max_size=5000))
def test_hash_of_a_file_is_that_of_its_bytes(folder: Path, data: bytes) -> None:
    path = folder / "data"
    path.write_bytes(data)
    assert sha256_of(path) == sha256_of(data) == hashlib.sha256(data).hexdigest()


@given(value=JSON)
def test_json_comes_back_as_written(folder: Path, value: object) -> None:
    path = folder / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert [entry.name for entry in folder.glob("*value.json*")] == ["value.json"]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_text_comes_back_as_written(folder: Path, text: str) -> None:
    write_text(folder / "text", text)
    assert (folder / "text").read_text(encoding="utf-8") == text


def test_file_is_readable_by_others_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text"
    write_text(path, "x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def interrupted_file(path: Path) -> None:
    with replaced_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def interrupted_folder(path: Path) -> None:
    with replaced_folder(path) as temporary:
        (temporary / "new").touch()
        raise KeyboardInterrupt


def test_old_file_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, [1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, [float("nan")])
    with pytest.raises(KeyboardInterrupt):
        interrupted_file(path)
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_old_folder_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with replaced_folder(path) as temporary:
        (temporary / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        interrupted_folder(path)
    assert [entry.name for entry in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for name in ("old", "new"):
        with replaced_folder(path) as temporary:
            (temporary / name).touch()
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with replaced_folder(path) as temporary:
        (temporary / "old").touch()

    def vanish() -> None:
        with replaced_folder(path) as temporary:
            temporary.rmdir()

    with pytest.raises(FileNotFoundError):
        vanish()
    assert [entry.name for entry in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def write_folder(path: Path, data: bytes) -> None:
    with replaced_folder(path) as temporary:
        (temporary / "data").write_bytes(data)


def test_full_disk_is_told_and_leaves_no_half_file(small_disk: Path) -> None:
    path = small_disk / "text"
    write_text(path, "old")
    with pytest.raises(MachineError, match=r"disk full while writing .*text\. Free some space"):
        write_text(path, "x" * 100_000)
    with pytest.raises(MachineError, match="disk full"):
        write_folder(small_disk / "out", bytes(100_000))
    assert path.read_text() == "old"
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_of_no_space_is_a_machine_error(tmp_path: Path, number: int) -> None:
    def write() -> None:
        with replaced_file(tmp_path / "text"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(MachineError, match="disk full while writing"):
        write()
    assert not any(tmp_path.iterdir())


def test_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "further" / "out"):
        with pytest.raises(MachineError, match=r"out cannot be written \(.*\)\. Choose another place\."):
            write_text(path, "y")
    with pytest.raises(MachineError, match=r"file cannot be written"):
        write_folder(tmp_path / "file", b"y")
    with pytest.raises(MachineError, match=r"cannot be written"):
        write_text(tmp_path, "y")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "x"


def test_unreadable_json_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file\."):
        read_json(tmp_path / "none.json")
    for content in (b"", b"{", b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.json is not valid JSON: "):
            read_json(tmp_path / "bad.json")
