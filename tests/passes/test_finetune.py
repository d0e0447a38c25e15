"""Fine-tuning: own speakers are learned, and the EER on trials that are not learned from decides what is kept."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from compress.artifact import Artifact
from compress.data import DataFolder
from compress.errors import CompressError, InputError, ModelError, SettingError, UnmetBudgetError
from compress.passes import Context, Finetune, Prune
from compress.passes.finetune import learned_from
from compress.pipeline import calibration_context
from compress.training.finetuner import Change
from compress.training.own_speech import OwnSpeech

QUICK: dict[str, Any] = {"crops": 64, "crop_s": 0.5, "steps": 8, "learning_rate": 1e-2}
LONG = QUICK | {"utterances": 120, "crops": 240, "steps": 60, "held_back": 0.5}


@pytest.fixture(scope="module")
def context(tiny_context: Context) -> Context:
    """Noise of twenty speakers, in each of whom another pattern comes and goes at another pace."""
    rng = np.random.default_rng(0)
    patterns = rng.standard_normal((20, 16)).astype(np.float32)
    paces = np.sin(np.arange(80) / (3 + np.arange(20)[:, None]))
    features = [
        (rng.standard_normal((80, 16)) + 0.7 * paces[i % 20][:, None] * patterns[i % 20]).astype(np.float32)
        for i in range(120)
    ]
    speakers = [f"s{i % 20}" for i in range(120)]
    return replace(tiny_context, calibration=[lambda f=f: f for f in features], speakers=speakers)


@pytest.fixture(scope="module")
def of_speech(fresh_tiny: Callable[..., torch.nn.Module]) -> Artifact:
    """A tiny network of 80 mel bins."""
    torch.manual_seed(0)
    return Artifact.from_module(fresh_tiny(num_mel_bins=80, channels=16))


def test_own_speakers_are_learned(tiny: Artifact, context: Context) -> None:
    result = Finetune(**LONG).run(tiny, context)
    notes = " ".join(result.history[-1].notes)
    found = re.search(
        r"EER on \d+ held-back utterances of 20 speakers, [\d,]+ trials: ([\d.]+) %.* to ([\d.]+) %", notes
    )
    assert found
    before, after = map(float, found.groups())
    assert after < before
    assert result.sha256 != tiny.sha256
    assert result.params == tiny.params


def test_a_pruned_network_is_tuned_and_stays_pruned(tiny: Artifact, context: Context) -> None:
    pruned = Prune(ratio=0.4, scope="uniform", round_to=1, bn_utterances=0).run(tiny, context)
    result = Finetune(**QUICK).run(pruned, context)
    assert result.params == pruned.params < tiny.params
    assert [step.name for step in result.history] == ["prune", "finetune"]
    assert result.sha256 != pruned.sha256


def test_what_became_worse_is_refused_and_the_network_stays(tiny: Artifact, context: Context) -> None:
    good = Finetune(**LONG).run(tiny, context)
    message = r"EER on .* more than chance\. The network was left as it was"
    with pytest.raises(UnmetBudgetError, match=message) as caught:
        Finetune(**LONG | {"learning_rate": 1.0, "steps": 40}).run(good, context)
    assert caught.value.best.sha256 == good.sha256
    assert "refused, the network is as it was" in caught.value.best.history[-1].notes[-1]


def test_a_seed_decides_and_nothing_else(tiny: Artifact, context: Context) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (Finetune(**QUICK, seed=seed).run(tiny, context) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_folder_per_speaker_is_learned_with_trials_of_another_folder(
    of_speech: Artifact, speech_folder: Path, other_speech: Path, tmp_path: Path
) -> None:
    data = DataFolder.read(speech_folder)
    own, other = tmp_path / "own", other_speech
    for name in data.utterances:
        (own / data.speaker(name)).mkdir(parents=True, exist_ok=True)
        shutil.copy(data.path(name), own / data.speaker(name))
    noise = tmp_path / "noise.scp"
    noise.write_text(f"a {next((speech_folder / 'wav').iterdir())}\n")
    settings = QUICK | {"steps": 2, "learning_rate": 1e-4, "noise": str(noise)}
    result = Finetune(data=str(own), trials=str(other), keep=str(other / "trials"), keep_points=100, **settings).run(
        of_speech, Context()
    )
    notes = result.history[-1].notes
    assert notes[0] == f"learned from 18 utterances of 6 speakers in {own}"
    assert notes[2].startswith(f"EER on 18 utterances of {other}, 153 trials: ")
    assert notes[3].startswith(f"EER on 18 utterances of {other}/trials, 153 trials: ")


def test_the_old_domain_may_rise_by_so_many_points() -> None:
    own, old = (Change(name, 99, 0.05, after, None, None) for name, after in (("own", 0.04), ("old", 0.056)))
    assert Finetune(keep_points=1.0).refusal([own, old]) is None
    assert Finetune(keep_points=0.5).refusal([own, old]) == (
        "EER on old, 99 trials: 5.00 % (–) to 5.60 % (–); too few speakers for an interval; 0.5 points more were"
        " allowed."
    )


@pytest.mark.parametrize(("interval", "worse"), [(None, True), ((-0.01, 0.02), False), ((0.001, 0.02), True)])
def test_chance_alone_refuses_nothing(interval: tuple[float, float] | None, worse: bool) -> None:
    assert bool(Finetune().refusal([Change("own", 99, 0.05, 0.06, interval, None)])) == worse
    assert Finetune().refusal([Change("own", 99, 0.05, 0.05, None, None)]) is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, r"finetune\.steps must be at least 1, got 0"),
    ({"blocks": 0}, r"finetune\.blocks must be at least 1, got 0"),
    ({"held_back": 0.0}, r"finetune\.held_back must be more than 0 and at most 0\.5, got 0\.0"),
    ({"decay": 1.5}, r"finetune\.decay must be more than 0 and at most 1, got 1\.5"),
    ({"unfrozen": 0.05}, r"finetune\.unfrozen must be in warmup\.\.1, here 0\.1\.\.1, got 0\.05"),
    ({"hold": -1.0}, r"finetune\.hold must be in 0\.\.1000, got -1\.0"),
    ({"margin": 2.0}, r"finetune\.margin must be in 0\.\.1\.571, got 2\.0"),
    ({"learning_rate": float("nan")}, r"finetune\.learning_rate must be more than 0"),
    ({"noise": "noise.scp"}, r"Name a data folder with finetune\.data"),
    ({"device": "gpu"}, r"finetune\.device must be cpu or cuda, got 'gpu'"),
    ({"seed": -1}, r"finetune\.seed must not be negative"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[next(iter(settings)) for settings, _ in WRONG])
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Finetune(**settings)


def refused(error: type[CompressError], message: str, artifact: Artifact, **settings: Any) -> None:
    with pytest.raises(error, match=message):
        Finetune(**QUICK | settings).run(artifact, Context())


def keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if wanted(line)))


def test_speakers_that_do_not_do(of_speech: Artifact, own_speech: Path) -> None:
    names = {line.split()[1]: line.split()[0] for line in (own_speech / "utt2spk").read_text().splitlines()}
    scp, last = own_speech / "wav.scp", list(names.values())
    lines = scp.read_text()
    keep_lines(scp, lambda line: line.split()[0] in last)  # one utterance of each
    refused(InputError, "0 trials of one speaker and 0 of two; both kinds are needed", of_speech, data=str(own_speech))
    scp.write_text(lines)
    (own_speech / "utt2spk").write_text("".join(f"{line.split()[0]} one\n" for line in lines.splitlines()))
    refused(InputError, r"has one speaker; two at least are needed, to tell apart", of_speech, data=str(own_speech))
    (own_speech / "utt2spk").unlink()
    refused(InputError, r"has no utt2spk", of_speech, data=str(own_speech))


def test_a_speaker_of_one_utterance_is_learned_and_told(of_speech: Artifact, own_speech: Path) -> None:
    lines = (own_speech / "utt2spk").read_text().splitlines()
    first = [line.split()[0] for line in lines if line.split()[1] == lines[0].split()[1]]
    keep_lines(own_speech / "wav.scp", lambda line: line.split()[0] not in first[1:])
    preview = Finetune(data=str(own_speech), **QUICK).preview(of_speech, Context())
    assert preview.notes[0].endswith("; 1 of them with only one")
    assert preview.rows[0]["part"] == "last layer"
    assert [row["from step"] for row in preview.rows] == sorted(row["from step"] for row in preview.rows)


def test_audio_that_does_not_do(of_speech: Artifact, own_speech: Path) -> None:
    files = sorted((own_speech / "wav").iterdir())
    samples, _ = soundfile.read(files[0], dtype="float32")
    soundfile.write(files[0], samples[::2], 8000)
    message = rf"{files[0]}: 8000 Hz\. The network takes 16000 Hz, and there is nothing above 4000 Hz"
    refused(InputError, message, of_speech, data=str(own_speech))
    files[1].write_bytes(b"")
    refused(InputError, r"1 further file cannot be used, either", of_speech, data=str(own_speech))
    soundfile.write(files[0], samples[:300], 16000)
    soundfile.write(files[1], samples, 16000)
    refused(InputError, rf"{files[0]}: ", of_speech, data=str(own_speech))
    soundfile.write(files[0], np.zeros_like(samples), 16000)
    refused(InputError, "digital silence throughout", of_speech, data=str(own_speech))
    files[0].unlink()
    refused(InputError, r"no such audio file", of_speech, data=str(own_speech))
    refused(InputError, r"no such data folder", of_speech, data="nowhere")


def test_trials_that_are_learned_from_are_refused(of_speech: Artifact, speech_folder: Path, own_speech: Path) -> None:
    for name in ("trials", "keep"):
        message = r"of its 18 utterances are learned from, one is .*; the EER would be too good"
        for tested in (speech_folder, own_speech):  # the files, or copies of them
            refused(InputError, message, of_speech, data=str(speech_folder), **{name: str(tested / "trials")})


def test_a_calibration_list_that_is_tested_on_is_refused(of_speech: Artifact, speech_folder: Path) -> None:
    context = calibration_context(DataFolder.read(speech_folder), of_speech)
    with pytest.raises(
        InputError, match=r"of its 18 utterances are learned from, one is .*; the EER would be too good"
    ):
        Finetune(**QUICK | {"utterances": 18}, trials=str(speech_folder / "trials")).run(of_speech, context)


def test_no_copy_of_what_is_learned_from_is_held_back(of_speech: Artifact, own_speech: Path) -> None:
    folder = DataFolder.read(own_speech)
    plain = Finetune(data=str(own_speech), **QUICK).preview(of_speech, Context())
    assert plain.notes[1].startswith("tested on 8 held-back utterances")
    for first, second, _ in zip(*[iter(folder.utterances)] * 3, strict=True):
        shutil.copy(folder.path(first), folder.path(second))
    fewer = Finetune(data=str(own_speech), **QUICK).preview(of_speech, Context())
    found = re.match(r"tested on (\d+) held-back utterances", fewer.notes[1])
    assert found
    assert int(found[1]) < 8


def test_only_utterances_that_are_heard_are_told(of_speech: Artifact, speech_folder: Path) -> None:
    own = OwnSpeech.of(DataFolder.read(speech_folder), of_speech, [], False, 1)
    chosen = own.choose(16, np.random.default_rng(0))
    assert learned_from(own, chosen).startswith("learned from 16 utterances of ")
    assert learned_from(own, own.choose(40, np.random.default_rng(0))).startswith("learned from 18 utterances of 6 ")


def test_without_speakers_or_with_too_few_crops(tiny: Artifact, context: Context) -> None:
    with pytest.raises(InputError, match=r"the calibration list does not name the speakers\. Name a data folder"):
        Finetune(**QUICK).run(tiny, replace(context, speakers=()))
    many = replace(context, speakers=[f"s{i // 2}" for i in range(60)])
    with pytest.raises(SettingError, match=r"finetune\.crops must be at least 60 for 30 speakers"):
        Finetune(**QUICK | {"crops": 32}).run(tiny, many)
    with pytest.raises(SettingError, match=r"crop_s: 0\.03 s are 1 frames; at least"):
        Finetune(**QUICK | {"crop_s": 0.03}).run(tiny, context)


def test_an_onnx_artifact_is_refused(tiny_onnx: Artifact, context: Context) -> None:
    with pytest.raises(ModelError, match="finetune takes torch artifacts; this one is onnx"):
        Finetune(**QUICK).run(tiny_onnx, context)


def test_what_is_read_is_told_so_that_a_run_knows_when_to_do_it_again(speech_folder: Path, tmp_path: Path) -> None:
    folder = str(speech_folder)
    lists = tuple(f"{folder}/{name}" for name in ("wav.scp", "utt2spk", "trials"))
    assert Finetune().reads == ()
    assert Finetune(data=folder, noise="n").reads == (*lists, "n")
    assert Finetune(data=folder, keep=f"{folder}/trials").reads == (*lists, *lists)
    other = tmp_path / "trials_other"
    other.write_text("")
    assert Finetune(data=folder, trials=str(tmp_path)).reads == (*lists, str(other))
    assert (Finetune(data=folder).calibration_utterances, Finetune().calibration_utterances) == (0, 60)


def test_with_qat_both_error_rates_are_of_the_rounded_network(tiny: Artifact, context: Context) -> None:
    hardly = LONG | {"steps": 1, "learning_rate": 1e-12}
    rounded, plain = (Finetune(**hardly, qat=qat).run(tiny, context).history[-1].notes[2] for qat in (True, False))
    for note in (rounded, plain):
        assert note.endswith("+0.00 points (+0.00 to +0.00)")
    assert rounded != plain


def test_with_qat_the_network_learns_rounded_and_is_given_back_in_float(tiny: Artifact, context: Context) -> None:
    result = Finetune(**LONG, qat=True).run(tiny, context)
    assert list(result.module.state_dict()) == list(tiny.module.state_dict())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in result.module.modules())
    assert result.sha256 != tiny.sha256
