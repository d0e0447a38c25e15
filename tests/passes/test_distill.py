"""Distillation: the student comes nearer to its teacher on speech that it did not learn from, or stays as it was."""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from compress.artifact import Artifact, FrontEnd
from compress.errors import CompressError, InputError, ModelError, SettingError
from compress.passes import Context, Distill, Prune
from compress.pipeline import check_files
from compress.progress import Silent
from compress.training import teacher as teacher_module

QUICK: dict[str, Any] = {"crops": 48, "crop_s": 0.5, "steps": 12, "utterances": 30, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def pruned(tiny: Artifact, tiny_context: Context) -> Artifact:
    return Prune(ratio=0.4, scope="uniform", round_to=1, bn_utterances=0).run(tiny, tiny_context)


@pytest.fixture(scope="module")
def context(tiny: Artifact, tiny_context: Context) -> Context:
    """Of a run that started from the tiny network."""
    return replace(tiny_context, source=tiny, speakers=[f"s{i % 7}" for i in range(len(tiny_context.calibration))])


@pytest.fixture(scope="session")
def of_speech(fresh_tiny: Callable[..., torch.nn.Module]) -> Callable[..., Artifact]:
    """Makes tiny networks of 80 mel bins."""

    def make(seed: int, **sizes: int) -> Artifact:
        torch.manual_seed(seed)
        return Artifact.from_module(fresh_tiny(**{"num_mel_bins": 80, "channels": 16} | sizes))

    return make


def figures(artifact: Artifact) -> tuple[float, float]:
    """Held-out cosine before and after."""
    note = next(note for note in artifact.history[-1].notes if note.startswith("cosine"))
    before, after = re.findall(r"-?\d\.\d{4,6}", note)
    return float(before), float(after)


def test_a_pruned_network_comes_nearer_to_what_it_was(pruned: Artifact, context: Context) -> None:
    result = Distill(**QUICK | {"steps": 60}).run(pruned, context)
    before, after = figures(result)
    assert after > before + 0.3 * (1 - before)
    assert result.params == pruned.params
    assert [step.name for step in result.history] == ["prune", "distill"]
    notes = " ".join(result.history[-1].notes)
    assert "teacher: the network that the run started from, 1" in notes
    assert "loss 1 relation + 1 embedding" in notes
    assert re.search(r"48 crops of 0\.5 s from 2\d utterances, 48 from [45] others to measure on", notes)


TERMS = {
    "alpha": {"alpha": 1.0},
    "beta": {"beta": 1.0},
    "beta that decays": {"beta": 1.0, "beta_decay": 0.9},
    "gamma": {"gamma": 1.0},
    "gamma by cosine": {"gamma": 1.0, "feature_loss": "cosine"},
    "delta": {"delta": 1.0},
    "delta of all relations": {"delta": 1.0, "relations": ("cosine", "distance", "angle")},
    "embedding": {"embedding": 1.0},
}


@pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS.keys())
def test_each_term_alone_is_learned(pruned: Artifact, context: Context, settings: dict[str, Any]) -> None:
    alone = {"embedding": 0.0, "delta": 0.0} | settings
    told: list[str] = []

    class Told(Silent):
        def say(self, text: str) -> None:
            told.append(text)

    Distill(**QUICK | alone | {"steps": 100}).run(pruned, replace(context, progress=Told()))
    first, last = (re.findall(r"(CE|KD|feature|relation|embedding) ([\d.e-]+)", line) for line in told)
    assert len(first) == len(last) == 1
    assert float(last[0][1]) < 0.9 * float(first[0][1])


def test_with_qat_the_network_learns_rounded_and_is_given_back_in_float(tiny: Artifact, context: Context) -> None:
    result = Distill(**QUICK | {"steps": 30, "learning_rate": 3e-4}, qat=True).run(tiny, context)  # its own teacher
    before, after = figures(result)
    assert before < 1  # rounded
    assert after >= before
    assert any("with 3 layers rounded as ptq rounds them" in note for note in result.history[-1].notes)
    assert list(result.module.state_dict()) == list(tiny.module.state_dict())
    assert result.precision == "fp32"


def test_the_published_setting(pruned: Artifact, context: Context) -> None:
    result = Distill(**QUICK, preset="published").run(pruned, context)
    notes = result.history[-1].notes
    assert notes[0].endswith("loss 1 CE + 0.7 KD + 0.3 feature")
    assert notes[1] == "features of norm1, second, norm2"


def test_a_network_that_would_get_worse_is_left_as_it_was(pruned: Artifact, context: Context) -> None:
    result = Distill(**QUICK | {"learning_rate": 1.0, "steps": 3}).run(pruned, context)
    assert result.sha256 == pruned.sha256
    assert any("at best, so the network was left as it was" in note for note in result.history[-1].notes)
    before, after = figures(result)
    assert before == after


def test_a_seed_decides_and_nothing_else_is_changed(pruned: Artifact, context: Context) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, same, other = (
        Distill(**QUICK, preset="published", embedding=1.0, seed=seed).run(pruned, context) for seed in (1, 1, 2)
    )
    assert one.sha256 == same.sha256 != other.sha256
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batch_norm_statistics_stay(pruned: Artifact, context: Context) -> None:
    before, after = pruned.module.state_dict(), Distill(**QUICK).run(pruned, context).module.state_dict()
    for name, value in before.items():
        kept = "running" in name or "num_batches" in name
        assert torch.equal(value, after[name]) == kept, name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distill"


def test_the_teacher_is_asked_once(
    pruned: Artifact, context: Context, tiny_teacher: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Distill(**QUICK, gamma=1.0)
    first = maker.run(pruned, context)
    assert "the teacher's answers were computed" in " ".join(first.history[-1].notes)
    monkeypatch.setattr(teacher_module, "ask", lambda *_: pytest.fail("the teacher was asked again"))
    second = maker.run(pruned, context)
    assert "the teacher's answers were read from the cache" in " ".join(second.history[-1].notes)
    assert first.sha256 == second.sha256
    for changed, where in (
        (replace(maker, seed=2), context),
        (replace(maker, layers=("second",)), context),
        (maker, replace(context, source=tiny_teacher)),
    ):
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            changed.run(pruned, where)


def test_a_damaged_cache_costs_time_alone(pruned: Artifact, context: Context, cache: Path) -> None:
    right = Distill(**QUICK).run(pruned, context)
    (kept,) = cache.iterdir()
    data = bytearray(kept.read_bytes())
    data[-100] ^= 1
    kept.write_bytes(data)
    again = Distill(**QUICK).run(pruned, context)
    assert "computed" in " ".join(again.history[-1].notes)
    assert again.sha256 == right.sha256


class Impatient(Silent):
    """Interrupts at the third step."""

    def track(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        for i, item in enumerate(items):
            if description == "distilling" and i == 2:
                raise KeyboardInterrupt
            yield item


def test_an_interrupt_leaves_everything_as_it_was(pruned: Artifact, context: Context, cache: Path) -> None:
    before = replace(pruned).sha256
    with pytest.raises(KeyboardInterrupt):
        Distill(**QUICK, gamma=1.0).run(pruned, replace(context, progress=Impatient()))
    assert replace(pruned).sha256 == before
    assert context.source is not None
    for model in (pruned.module, context.source.module):
        assert not any(module._forward_hooks for module in model.modules())
        assert not any(module.training for module in model.modules())
    assert [path.suffix for path in cache.iterdir()] == [".answers"]
    assert "read from the cache" in " ".join(Distill(**QUICK, gamma=1.0).run(pruned, context).history[-1].notes)


def test_a_teacher_of_another_embedding_size_and_architecture(
    of_speech: Callable[..., Artifact], speech_folder: Path, tmp_path: Path
) -> None:
    student, teacher = of_speech(0, embedding_size=8), of_speech(1, embedding_size=12, channels=24)
    maker = Distill(data=str(speech_folder), preset="published", embedding=1.0, delta=1.0, **QUICK)
    result = maker.run(student, Context(source=teacher))
    assert result.embedding_size == 8
    assert result.module.state_dict().keys() == student.module.state_dict().keys()
    assert not any(note.startswith("cosine") for note in result.history[-1].notes)  # sizes differ: there is none
    assert "from 15 utterances, 48 from 3 others to measure on" in " ".join(result.history[-1].notes)


def test_an_onnx_teacher_says_what_the_same_network_says(
    pruned: Artifact, context: Context, tiny_onnx: Artifact, tiny_waveform: Artifact
) -> None:
    notes = []
    for teacher in (context.source, tiny_onnx, tiny_waveform):
        result = Distill(**QUICK).run(pruned, replace(context, source=teacher))
        notes.append([note for note in result.history[-1].notes if note.startswith(("distance", "cosine"))])
    assert notes[0] == notes[1] == notes[2]


def test_noise_is_added_to_some_utterances(
    of_speech: Callable[..., Artifact], speech_folder: Path, tmp_path: Path
) -> None:
    student, teacher = of_speech(0), of_speech(1)
    noise = tmp_path / "noise.scp"
    noise.write_text(f"a {next((speech_folder / 'wav').iterdir())}\n")
    plain, noisy = (
        Distill(data=str(speech_folder), noise=given, **QUICK).find_speech(student, Context())
        for given in (None, str(noise))
    )
    changed = [not np.array_equal(a(), b()) for a, b in zip(plain.load, noisy.load, strict=True)]
    assert 0 < sum(changed) < len(changed)
    assert Distill(data=str(speech_folder), noise=str(noise), **QUICK).run(student, Context(source=teacher)).history


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"preset": "unlabelled"}, r"distill\.preset must be unlabeled or published, got 'unlabelled'"),
    ({"relations": ("angel",)}, r"distill\.relations must be of cosine, distance, angle, got 'angel'"),
    ({"embedding": 0.0, "delta": 0.0}, "all of alpha, beta, gamma, delta, embedding are 0"),
    ({"delta": -1.0}, r"distill\.delta must be 0 or more, got -1\.0"),
    ({"relations": ()}, r"distill\.relations names none"),
    ({"steps": 0}, r"distill\.steps must be at least 1, got 0"),
    ({"batch_size": 2}, r"distill\.batch_size must be at least 4, got 2"),
    ({"crop_s": float("nan")}, r"distill\.crop_s must be more than 0 and at most 60, got nan"),
    ({"temperature": 0.0}, r"distill\.temperature must be more than 0"),
    ({"beta_decay": 1.0}, r"distill\.beta_decay must be in 0\.\.1, less than 1"),
    ({"margin": 2.0}, r"distill\.margin must be in 0\.\.1\.57 radians"),
    ({"device": "gpu"}, r"distill\.device must be cpu or cuda, got 'gpu'"),
    ({"noise": "noise.scp"}, r"Name a data folder with distill\.data"),
    ({"seed": -1}, r"distill\.seed must not be negative"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[next(iter(settings)) for settings, _ in WRONG])
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Distill(**settings)


def refused(error: type[CompressError], message: str, artifact: Artifact, context: Context, **settings: Any) -> None:
    with pytest.raises(error, match=message):
        Distill(**QUICK | settings).run(artifact, context)


def test_without_a_teacher(pruned: Artifact, context: Context) -> None:
    message = r"no teacher\. .* Name one with distill\.teacher \(--teacher\)"
    refused(InputError, message, pruned, replace(context, source=None))
    refused(InputError, message, pruned, replace(context, source=pruned))


def test_teachers_that_do_not_fit(
    pruned: Artifact, context: Context, tiny_onnx: Artifact, of_speech: Callable[..., Artifact], tmp_path: Path
) -> None:
    pruned.save(tmp_path / "self")
    of_speech(0).save(tmp_path / "speech")
    message = r"takes 80 mel bins at 16000 Hz minus their mean; the student takes 16 mel bins at 16000 Hz minus"
    refused(ModelError, message, pruned, replace(context, source=of_speech(0)))
    other = replace(of_speech(0), front_end=FrontEnd(num_mel_bins=80, cmn=False))
    refused(ModelError, "80 mel bins at 16000 Hz with their mean; the", of_speech(1), replace(context, source=other))
    refused(ModelError, "gives only its embedding", pruned, replace(context, source=tiny_onnx), gamma=1.0)
    refused(ModelError, "no such model", pruned, context, teacher=str(tmp_path / "none.safetensor"))
    refused(SettingError, "Did you mean 'campplus'", pruned, context, teacher="camplus")


def test_speech_that_does_not_do(
    pruned: Artifact, context: Context, of_speech: Callable[..., Artifact], own_speech: Path
) -> None:
    nobody = replace(context, speakers=())
    for term in ("alpha", "beta"):
        refused(InputError, rf"{term} tell speakers apart, and the calibration list", pruned, nobody, **{term: 1.0})
    few = Context(calibration=context.calibration[:5], source=context.source)
    refused(InputError, r"distill\.utterances: 30 calibration utterances were asked for, the list has 5", pruned, few)
    student, where = of_speech(0), replace(context, source=of_speech(1))
    lines = (own_speech / "wav.scp").read_text().splitlines()
    (own_speech / "wav.scp").write_text("\n".join(lines[:5]))
    message = rf"{own_speech} has 5 utterances; 8 at least are needed"
    refused(InputError, message, student, where, data=str(own_speech))
    (own_speech / "wav.scp").write_text("\n".join(lines))
    (own_speech / "utt2spk").unlink()
    refused(
        InputError, "beta tell speakers apart, and .* does not name two", student, where, data=str(own_speech), beta=1.0
    )
    short = own_speech / lines[4].split()[1]
    samples, _ = soundfile.read(short)
    soundfile.write(short, samples[:160], 16000)
    refused(InputError, rf"{short}: waveform has 160 samples", student, where, data=str(own_speech))
    soundfile.write(short, samples[::2], 8000)  # resampled: any rate will do
    assert Distill(data=str(own_speech), **QUICK).find_speech(student, where)
    (own_speech / lines[3].split()[1]).unlink()
    refused(InputError, r"\.wav: no such audio file", student, where, data=str(own_speech))
    refused(InputError, "no such data folder", student, where, data="nowhere")
    refused(SettingError, r"crop_s: 0\.03 s are 1 frames; at least", pruned, context, crop_s=0.03)


def test_what_is_read_is_told_so_that_a_run_knows_when_to_do_it_again(speech_folder: Path, tmp_path: Path) -> None:
    assert Distill().reads == Distill(teacher="campplus").reads == ()
    folder = str(speech_folder)
    lists = (f"{folder}/wav.scp", f"{folder}/utt2spk")
    assert Distill(data=folder, teacher="a.onnx", noise="n").reads == ("a.onnx", *lists, "n")
    assert Distill(teacher=str(tmp_path)).reads == (f"{tmp_path}/artifact.json",)
    assert Distill(data=folder).calibration_utterances == 0
    assert Distill().calibration_utterances == 60


def test_a_dry_run_tells_teacher_and_layers(pruned: Artifact, context: Context) -> None:
    preview = Distill(**QUICK, preset="published").preview(pruned, context)
    assert [row["layer"] for row in preview.rows] == ["norm1", "second", "norm2"]
    assert "30 utterances to learn from" in preview.notes


def test_a_folder_per_speaker_is_learned_from(
    of_speech: Callable[..., Artifact], speech_folder: Path, tmp_path: Path
) -> None:
    for line in (speech_folder / "utt2spk").read_text().splitlines():
        utterance, speaker = line.split()
        (tmp_path / speaker).mkdir(exist_ok=True)
        shutil.copy(speech_folder / "wav" / f"{utterance}.wav", tmp_path / speaker)
    maker = Distill(data=str(tmp_path), preset="published", **QUICK)
    check_files(maker)
    result = maker.run(of_speech(0), Context(source=of_speech(1)))
    assert "48 crops of 0.5 s from 15 utterances" in " ".join(result.history[-1].notes)
