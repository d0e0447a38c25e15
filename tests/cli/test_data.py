"""``data check`` and ``data prepare``."""

import shutil
from collections.abc import Callable
from pathlib import Path


def test_check_sums_up_a_good_folder(cli: Callable, speech_folder: Path) -> None:
    code, out, _ = cli("data", "check", speech_folder)
    assert code == 0
    assert out == (
        f"{speech_folder}: 18 utterances, 6 speakers, 18.0 s, 16000 Hz (18), trials: 18 targets, 135 non-targets."
        " 0 errors, 0 warnings.\n"
    )


def test_check_names_every_error(cli: Callable, own_speech: Path) -> None:
    first, second, *_ = sorted((own_speech / "wav").iterdir())
    first.unlink()
    second.write_bytes(b"")
    with (own_speech / "trials").open("a") as stream:
        stream.write("1 nobody nowhere\n")
    code, out, err = cli("data", "check", own_speech)
    assert code == 2
    assert "wav.scp:1: error: " in out
    assert "wav.scp:2: error: " in out
    assert "trials:154: error: utterance 'nobody' is not in wav.scp." in out
    assert "Traceback" not in err


def test_check_of_what_is_not_there(cli: Callable) -> None:
    code, out, err = cli("data", "check", "none")
    assert (code, out) == (2, "")
    assert err == "error: none: no such data folder. It is a folder that holds a wav.scp.\n"


def test_prepare_makes_a_folder_that_passes_the_check(cli: Callable, speech_folder: Path, tmp_path: Path) -> None:
    for line in (speech_folder / "utt2spk").read_text().splitlines():
        utterance, speaker = line.split()
        place = tmp_path / "corpus" / speaker
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(speech_folder / "wav" / f"{utterance}.wav", place)
    code, out, _ = cli("data", "prepare", "folder", tmp_path / "corpus", tmp_path / "made")
    assert code == 0
    assert f"{tmp_path / 'made'} written. `compress data check {tmp_path / 'made'}` looks it over." in out
    code, out, _ = cli("data", "check", tmp_path / "made")
    assert code == 0
    assert "18 utterances, 6 speakers" in out


def test_prepare_names_what_is_wrong(cli: Callable, tmp_path: Path, unchanged: Callable) -> None:
    before = unchanged()
    code, _, err = cli("data", "prepare", "voxcleb", tmp_path, "out")
    assert code == 2
    assert "unknown corpus 'voxcleb'." in err
    code, _, err = cli("data", "prepare", "folder", tmp_path / "none", "out")
    assert code == 2
    assert "none" in err
    assert unchanged() == before
