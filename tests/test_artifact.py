"""Artifacts: what is saved comes back, and what was altered is refused."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.artifact import Artifact, Format, FrontEnd, Step, Threshold
from compress.errors import CompressError, InputError, MachineError, ModelError, SettingError
from compress.files import sha256_of
from compress.models import architecture
from compress.passes import TRT, Context
from compress.runners import golden_outputs, open_runner
from compress.surgery import remove_channels, trace, widths_stored_in

KINDS = ("torch", "onnx", "int8", "deferred")


@pytest.fixture(params=KINDS)
def artifact(request, tiny: Artifact, tiny_onnx: Artifact, tiny_int8: Artifact) -> Artifact:
    if request.param == "deferred":
        return TRT().run(tiny_int8, Context())
    return {"torch": tiny, "onnx": tiny_onnx, "int8": tiny_int8}[request.param]


@pytest.fixture
def folder(tiny_onnx: Artifact, tmp_path: Path) -> Path:
    """A saved artifact to alter."""
    tiny_onnx.save(tmp_path / "artifact")
    return tmp_path / "artifact"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_record(folder: Path, **changes: object) -> None:
    path = folder / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_artifact_comes_back_as_saved(artifact: Artifact, fresh_tiny, noise, tmp_path: Path) -> None:
    full = replace(
        artifact,
        threshold=Threshold(0.42, 0.031, "trials_hard", "speechocean762/dev"),
        metrics={"eer": 0.031, "eer_ci95": [0.02, 0.04], "decision_flips": None},
        golden={} if artifact.deferred else golden_outputs(open_runner(artifact, 1), noise(2, 16)),
    )
    full.save(tmp_path / "artifact")
    loaded = Artifact.load(tmp_path / "artifact", fresh_tiny() if artifact.model is not None else None)
    for field in fields(Artifact):
        if field.name not in ("model", "golden"):
            assert getattr(loaded, field.name) == getattr(full, field.name), field.name
    assert dict(loaded.payload) == dict(full.payload)
    assert (loaded.sha256, loaded.size_bytes) == (full.sha256, full.size_bytes)
    assert loaded.golden.keys() == full.golden.keys()
    assert all(np.array_equal(loaded.golden[name], full.golden[name]) for name in full.golden)
    if not artifact.deferred:
        features = noise(1, 16, seed=5)[0][None]
        assert np.array_equal(open_runner(loaded, 1).run(features), open_runner(full, 1).run(features))


def test_record_tells_size_and_hash_of_every_file(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "artifact")
    record = json.loads((tmp_path / "artifact" / "artifact.json").read_text())
    written = contents(tmp_path / "artifact")
    assert set(written) == {"artifact.json", *record["files"]}
    for name, entry in record["files"].items():
        assert entry == {"size_bytes": len(written[name]), "sha256": sha256_of(written[name])}
    assert artifact.size_bytes == sum(entry["size_bytes"] for entry in record["files"].values())
    hashes = [entry["sha256"] for _, entry in sorted(record["files"].items())]
    assert artifact.sha256 == (hashes[0] if len(hashes) == 1 else sha256_of("".join(hashes).encode()))
    assert record["schema"] == 1
    assert record["versions"]["torch"] == torch.__version__


def test_network_known_by_name_is_rebuilt(small_campplus: Artifact, tmp_path: Path) -> None:
    small_campplus.save(tmp_path / "artifact")
    loaded = Artifact.open(tmp_path / "artifact")
    assert loaded.payload == small_campplus.payload
    assert (loaded.arch, loaded.arguments) == ("campplus", small_campplus.arguments)


def test_foreign_network_needs_an_instance(tiny: Artifact, fresh_tiny, tmp_path: Path) -> None:
    tiny.save(tmp_path / "artifact")
    with pytest.raises(
        ModelError, match=r"whose class is not known here.*Artifact\.load\(folder, module=MyNetwork\(\)\)"
    ):
        Artifact.load(tmp_path / "artifact")
    fresh = fresh_tiny()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    loaded = Artifact.load(tmp_path / "artifact", module=fresh)
    assert loaded.payload == tiny.payload
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    with pytest.raises(ModelError, match="Linear has no such tensor"):
        Artifact.load(tmp_path / "artifact", module=nn.Linear(16, 4))


def test_module_is_copied_and_put_in_eval_mode(fresh_tiny) -> None:
    module = fresh_tiny().train()
    artifact = Artifact.from_module(module, FrontEnd(num_mel_bins=16))
    assert module.training
    assert not artifact.module.training
    assert artifact.module is not module
    assert artifact.params == sum(parameter.numel() for parameter in module.parameters())
    assert artifact.embedding_size == 24
    assert artifact.macs is not None
    assert artifact.macs > 100 * (16 * 48 * 5 + 48 * 48 * 3)  # 100 frames a second, convolutions alone


def test_derived_artifact_forgets_what_was_measured_on_its_parent(tiny: Artifact) -> None:
    measured = replace(tiny, threshold=Threshold(0.4, 0.03, "trials", "data"), metrics={"eer": 0.03})
    derived = measured.with_model(tiny.module, Step("prune", {"ratio": 0.4}))
    assert (derived.threshold, derived.metrics, derived.golden) == (None, {}, {})
    assert [step.name for step in derived.history] == ["prune"]
    assert measured.history == ()


class Returns(nn.Module):
    """Returns what it is given."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> object:
        return self.output


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (torch.zeros(2, 3, 4), r"\[2, 3, 4\]"),
        (torch.zeros(4), r"\[4\]"),
        (torch.zeros(1, 4), r"\[1, 4\]"),
        ((torch.zeros(2, 4), None), "tuple"),
    ],
)
def test_network_that_returns_no_embedding_is_refused(output: object, found: str) -> None:
    with pytest.raises(ModelError, match=rf"Returns returns {found}; \(batch, embedding_size\) was expected"):
        Artifact.from_module(Returns(output))


def test_network_for_other_features_is_refused(fresh_tiny) -> None:
    with pytest.raises(ModelError, match=r"Tiny does not take features of shape \[2, 298, 80\]"):
        Artifact.from_module(fresh_tiny())


def test_network_with_nan_weights_is_refused(fresh_tiny) -> None:
    module = fresh_tiny()
    module.second.weight.data[0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"Tiny holds NaN or infinite weights in second\.weight"):
        Artifact.from_module(module, FrontEnd(num_mel_bins=16))


def test_altered_file_is_refused(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.onnx was altered: its SHA-256 is not the one in artifact\.json"):
        Artifact.load(folder)


def test_missing_file_is_named(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx is missing; artifact\.json lists it"):
        Artifact.load(folder)


@pytest.mark.parametrize("schema", [0, 2, None, "1"])
def test_other_schema_is_refused(folder: Path, schema: object) -> None:
    edit_record(folder, schema=schema)
    with pytest.raises(ModelError, match=rf"artifact\.json has schema {schema}; this version reads 1"):
        Artifact.load(folder)


def test_folder_without_a_record_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not an artifact folder: it has no artifact\.json"):
        Artifact.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"schema": 1}', '{"schema": 1, "files": []}'])
def test_broken_record_is_told(folder: Path, content: str) -> None:
    (folder / "artifact.json").write_text(content)
    with pytest.raises(CompressError, match=r"artifact\.json"):
        Artifact.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "tflite"},
        {"front_end": {"sample_rate": 16000, "hop": 160}},
        {"model": {}},
        {"model": None},
        {"history": [{"name": "prune"}]},
        {"threshold": {"value": 0.3}},
        {"deferred": {"reason": "no GPU"}},
        {"files": {"model.onnx": {}}},
        {"files": {}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_record_that_lacks_something_is_told(folder: Path, changes: dict[str, object]) -> None:
    edit_record(folder, **changes)
    with pytest.raises(ModelError, match=r"artifact\.json"):
        Artifact.load(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "sub/../../secret", "sub//model.onnx", "a/b/c", "", "..", "."]
)
def test_record_cannot_name_files_outside_its_folder(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"x")
    edit_record(folder, files={name: {"size_bytes": 1, "sha256": sha256_of(b"x")}})
    with pytest.raises(ModelError, match=r"artifact\.json lists .*, which is not a name of a file in its folder"):
        Artifact.load(folder)


def test_broken_golden_file_is_told(folder: Path) -> None:
    (folder / "golden.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ModelError, match=r"golden\.npz cannot be read"):
        Artifact.load(folder)


def test_saving_replaces_an_older_artifact(tiny_int8: Artifact, folder: Path) -> None:
    (folder / "left-over").touch()
    tiny_int8.save(folder)
    assert Artifact.load(folder).sha256 == tiny_int8.sha256
    assert not (folder / "left-over").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_saving_over_anything_else_is_refused(tiny_onnx: Artifact, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(InputError, match=r"exists and is not an artifact folder\. Choose another output folder\."):
            tiny_onnx.save(place)
    assert contents(tmp_path) == {"thesis.tex": b"x"}


def test_full_disk_is_told_and_leaves_nothing_half_written(small_campplus: Artifact, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(b"x")
    with pytest.raises(MachineError, match=r"disk full while writing .*artifact\. Free some space, then try again"):
        small_campplus.save(small_disk / "artifact")
    assert contents(small_disk) == {"other": b"x"}
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_golden_file_on_a_full_disk_is_told(tiny_int8: Artifact, small_disk: Path) -> None:
    golden = {"features_0": np.random.default_rng(0).standard_normal((1, 3000, 16)).astype(np.float32)}
    with pytest.raises(MachineError, match="disk full"):
        replace(tiny_int8, golden=golden).save(small_disk / "artifact")
    assert not any(small_disk.iterdir())


@given(
    duration_s=st.floats(0.03, 5),
    sample_rate=st.sampled_from([8000, 16000, 22050, 44100]),
    num_mel_bins=st.sampled_from([16, 40, 80]),
)
def test_front_end_gives_as_many_frames_as_it_tells(duration_s: float, sample_rate: int, num_mel_bins: int) -> None:
    front_end = FrontEnd(sample_rate, num_mel_bins)
    waveform = np.random.default_rng(0).standard_normal(int(duration_s * sample_rate)).astype(np.float32)
    assert front_end(waveform).shape == (front_end.frames_of(duration_s), num_mel_bins)


def test_front_end_without_cmn_keeps_the_mean() -> None:
    waveform = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    plain, normalised = FrontEnd(cmn=False)(waveform), FrontEnd()(waveform)
    np.testing.assert_allclose(plain - plain.mean(0), normalised, atol=1e-4)
    assert np.abs(plain.mean(0)).mean() > 0.1


def test_front_end_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"sample_rate must be in 4000\.\.192000 Hz, got 16\."):
        FrontEnd(sample_rate=16)
    with pytest.raises(InputError, match=r"only 25/10 ms Povey windows are supported, got \('hamming', 25\.0, 10\.0\)"):
        FrontEnd(window="hamming")


def test_embedded_weights_open_by_name(campplus: Artifact) -> None:
    assert (campplus.arch, campplus.task, campplus.params, campplus.embedding_size) == (
        "campplus",
        "sv",
        6_848_544,
        192,
    )
    assert {value.dtype for value in campplus.module.parameters()} == {torch.float32}


def test_checkpoint_opens_with_its_network(small_campplus: Artifact, tmp_path: Path) -> None:
    torch.save(small_campplus.module.state_dict(), tmp_path / "weights.pt")
    opened = Artifact.open(tmp_path / "weights.pt", arch="campplus")
    assert opened.payload == small_campplus.payload
    assert (opened.arch, opened.format, opened.task) == ("campplus", Format.TORCH, "sv")
    with pytest.raises(SettingError, match="--arch NAME"):
        Artifact.open(tmp_path / "weights.pt")


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"unknown model 'campplu'\. Did you mean 'campplus'\?"):
        Artifact.open("campplu")
    for source in ("runs/none", "weights.txt", str(tmp_path / "none")):
        with pytest.raises(
            ModelError, match=r"no such model\. A checkpoint, artifact folder or \.onnx file was expected"
        ):
            Artifact.open(source)
    with pytest.raises(ModelError, match=r"none\.onnx: no such ONNX file"):
        Artifact.open(tmp_path / "none.onnx")


def test_a_network_for_another_task_is_refused(tmp_path: Path) -> None:
    torch.save(architecture("fsmn_vad").build().state_dict(), tmp_path / "vad.pt")
    for source, arch in ((tmp_path / "vad.pt", "fsmn_vad"), ("fsmn_vad", None)):
        with pytest.raises(
            SettingError,
            match=r"fsmn_vad is a network for vad; .* speaker verification \(sv\).*load_model\(PATH, arch='fsmn_vad'\)",
        ):
            Artifact.open(source, arch)


def test_a_network_on_a_gpu_is_taken_to_the_cpu(fresh_tiny) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    network = fresh_tiny().cuda()
    artifact = Artifact.from_module(network, FrontEnd(num_mel_bins=16))
    assert {value.device.type for value in artifact.module.state_dict().values()} == {"cpu"}
    assert next(network.parameters()).device.type == "cuda"


class StoredWidth(nn.Module):
    """Splits its channels at a width that it stores, as Res2Net blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.enter, self.inner, self.leave = nn.Linear(16, 12), nn.Linear(6, 6), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.split(torch.relu(self.enter(x)), self.width, -1)
        result: torch.Tensor = self.leave(torch.cat([first, self.inner(second)], -1)).mean(1)
        return result


@torch.no_grad()
def test_widths_that_a_foreign_network_stores_come_back(tmp_path: Path) -> None:
    dense = Artifact.from_module(StoredWidth(), FrontEnd(num_mel_bins=16))
    graph = trace(dense.module, torch.randn(1, 30, 16))
    pruned = remove_channels(dense.module, graph, {"enter": [1, 4]})
    dense.with_model(pruned, Step("prune", {}), widths_stored_in(pruned, graph)).save(tmp_path / "pruned")
    loaded = Artifact.load(tmp_path / "pruned", StoredWidth())
    features = torch.randn(2, 30, 16)
    assert loaded.module.width == 4
    assert torch.equal(loaded.module(features), pruned(features))
    Artifact.load(tmp_path / "pruned", StoredWidth()).save(tmp_path / "again")
    assert Artifact.load(tmp_path / "again", StoredWidth()).stored_widths == {"width": 4}
