"""What has to be in a wheel is in it."""

import configparser
from pathlib import Path

import compress
from compress.data import embedded_data
from compress.models import ARCHITECTURES

REPOSITORY = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(REPOSITORY / "setup.cfg")


def lines(section: str, key: str) -> list[str]:
    return SETUP[section][key].split()


def test_every_package_is_listed() -> None:
    found = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in REPOSITORY.glob("compress/**/__init__.py")}
    assert set(lines("options", "packages")) == found | {"compress.calib_data"}


def test_every_other_file_is_package_data() -> None:
    root = REPOSITORY / "compress"
    patterns = lines("options.package_data", "compress")
    listed = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    others = {p for p in root.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others <= listed


def test_the_embedded_data_and_weights_are_there() -> None:
    assert (embedded_data() / "wav.scp").is_file()
    assert [name for name, network in ARCHITECTURES.items() if network.weights] == ["campplus"]


def test_the_version_is_told_once() -> None:
    assert SETUP["metadata"]["version"] == compress.__version__


def test_no_file_is_over_20_megabytes() -> None:
    folders = [REPOSITORY / name for name in ("compress", "calib_data", "tests", "docs", "benchmarks", "recipes")]
    assert not [p for folder in folders for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 20e6]
