"""Runs: what they leave on disk, what they take over from an earlier one, and what they refuse."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx
import pytest
import soundfile
import torch
import yaml

import compress
from compress import machine, pipeline, table
from compress.artifact import Artifact, Format, FrontEnd
from compress.cli.inspect import GOLDEN_COSINE, golden_cosine
from compress.config import RunConfig, from_mapping, read_yaml
from compress.data import DataFolder
from compress.errors import InputError, MachineError, ModelError, SettingError
from compress.front_end_graph import front_end_graph, join_front_end
from compress.passes import PTQ, TRT, Context, Finetune, Optimize, Pass, Prune
from compress.pipeline import Plan, _identity, claim_folder, plan, run
from compress.report import summarize
from compress.runners import open_runner, torch_threads

T = TypeVar("T")


@dataclass(frozen=True)
class Refuse(Pass):
    """A pass that takes nothing."""

    name: ClassVar[str] = "refuse"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.ONNX

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        raise ModelError("refuse takes nothing.")


@dataclass(frozen=True)
class Threads(Pass):
    """A pass that notes how many threads PyTorch uses."""

    name: ClassVar[str] = "threads"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.ONNX

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        step = self.step(f"{torch.get_num_threads()} threads")
        return artifact.with_files(artifact.files, step, Format.ONNX, artifact.precision)


@dataclass(frozen=True)
class Reader(Pass):
    """A pass that notes what a file holds, and whose utterances it is given."""

    name: ClassVar[str] = "reader"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.ONNX

    path: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.path,)

    @property
    def calibration_utterances(self) -> int:
        return 3

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        list(context.progress.track([1, 2], "reading"))
        step = self.step(Path(self.path).read_text(), " ".join(map(str, context.speakers)))
        return artifact.with_files(artifact.files, step, Format.ONNX, artifact.precision)


class Recorder:
    """Keeps the lines of progress."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def of(self, step: str) -> str:
        """What was said of a step."""
        return "\n".join(line for line in self.lines if line.startswith(f"{step}:"))


@pytest.fixture
def config(tiny_graph: Path, speech_folder: Path, tmp_path: Path) -> RunConfig:
    """``ptq,trt`` over the tiny graph, to a new folder."""
    passes = (PTQ(utterances=8), TRT())
    return RunConfig(passes, str(tiny_graph), data=str(speech_folder), out=str(tmp_path / "run"), timing_s=0.0)


@pytest.fixture
def done(config: RunConfig, tiny_run: Path) -> RunConfig:
    """The same, already run."""
    shutil.copytree(tiny_run, config.folder)
    return config


def resume(config: RunConfig) -> tuple[dict[str, Any], Recorder]:
    recorder = Recorder()
    return run(config, resume=True, progress=recorder), recorder


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


class TestFinishedRun:
    """``prune,ptq,trt`` over a narrow ECAPA-TDNN."""

    STEPS = ("00-baseline", "01-prune", "02-onnx", "03-ptq", "04-trt")

    @pytest.fixture
    def content(self, finished_run: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((finished_run / "table.json").read_text())
        return found

    def test_the_folder_holds_what_is_specified(self, finished_run: Path) -> None:
        files = {"run.yaml", "table.json", "table.csv", "table.md", "report.html", "events.jsonl", "timings.json"}
        assert {path.name for path in finished_run.iterdir()} == files | set(self.STEPS)
        assert not temporaries(finished_run)

    def test_there_is_a_row_for_the_baseline_and_each_pass(self, content: dict[str, Any]) -> None:
        assert content["schema"] == 1
        assert [(r["variant"], r["pass"], r["format"], r["precision"], r["status"]) for r in content["rows"]] == [
            ("baseline", None, "torch", "fp32", "ok"),
            ("prune", "prune", "torch", "fp32", "ok"),
            ("prune+onnx", "onnx", "onnx", "fp32", "ok"),
            ("prune+ptq", "ptq", "onnx", "int8", "ok"),
            ("prune+ptq+trt", "trt", "tensorrt", "int8", "deferred"),
        ]

    def test_every_row_has_every_field_and_what_ran_is_measured(self, content: dict[str, Any]) -> None:
        unmeasured = {"reason", "command", "decision_flips", "cosine_mean", "cosine_min", "eer_rise", "eer_rise_ci95"}
        for place, figures in enumerate(content["rows"]):
            assert list(figures) == list(table.FIELDS)
            if figures["status"] == "ok":
                empty = {name for name in table.FIELDS if figures[name] is None}
                assert empty <= (unmeasured | {"pass"} if place == 0 else {"reason", "command"})

    def test_what_was_not_measured_is_null(self, content: dict[str, Any]) -> None:
        deferred = content["rows"][-1]
        for name in ("eer", "eer_ci95", "threshold", "decision_flips", "latency_ms", "size_bytes", "peak_rss_bytes"):
            assert deferred[name] is None
        assert "no engine was built" in deferred["reason"]
        assert deferred["command"] == "python build_engine.py"

    def test_figures_are_plausible(self, content: dict[str, Any]) -> None:
        baseline, prune, onnx, int8, _ = content["rows"]
        assert prune["params"] == pytest.approx(0.7 * baseline["params"], rel=0.02)
        assert int8["size_bytes"] < 0.5 * onnx["size_bytes"]
        assert prune["macs"] < baseline["macs"]
        assert onnx["cosine_mean"] == pytest.approx(prune["cosine_mean"], abs=1e-5)
        assert onnx["eer"] == prune["eer"]
        assert baseline["speedup"] == pytest.approx(1, abs=0.2)
        for figures in content["rows"][:4]:
            latency = figures["latency_ms"]
            assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
            assert latency["p50"] < figures["e2e_latency_ms"]["p95"]
            assert figures["rtf"] == pytest.approx(figures["e2e_latency_ms"]["mean"] / 3000)
            assert figures["n_trials"] == 153
            assert 20e6 < figures["peak_rss_bytes"] < 4e9

    def test_data_and_machine_are_described(self, content: dict[str, Any]) -> None:
        assert content["data"] == {
            "folder": "data",
            "trials": "trials",
            "n_trials": 153,
            "n_targets": 18,
            "n_utterances": 18,
            "n_speakers": 6,
            "calibration_utterances": 18,
        }
        assert content["machine"]["threads"] == 1
        assert content["machine"]["versions"]["torch"]

    @pytest.mark.parametrize("step", STEPS)
    def test_each_step_is_an_artifact_folder(self, finished_run: Path, content: dict[str, Any], step: str) -> None:
        artifact = Artifact.load(finished_run / step)
        row = content["rows"][self.STEPS.index(step)]
        assert row["artifact"] == {"folder": step, "sha256": artifact.sha256}
        assert [record.name for record in artifact.history] == ["prune", "onnx", "ptq", "trt"][: len(artifact.history)]
        assert artifact.format.value == row["format"]
        if artifact.deferred:
            with pytest.raises(MachineError, match=r"is not built yet: .* Then: python build_engine"):
                compress.load(finished_run / step)
            return
        runner = compress.load(finished_run / step)
        waveform = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
        assert runner.embed(waveform, 16000).shape == (artifact.embedding_size,)
        assert len(artifact.golden) == 4
        assert golden_cosine(runner, artifact) >= GOLDEN_COSINE
        assert artifact.threshold is not None
        assert artifact.threshold.value == row["threshold"]
        assert (artifact.threshold.trials, artifact.threshold.data) == ("trials", "data")
        assert artifact.metrics["eer"] == row["eer"]

    def test_run_yaml_is_the_full_configuration(self, finished_run: Path) -> None:
        found = from_mapping(read_yaml(finished_run / "run.yaml"), "run.yaml")
        assert [step.name for step in found.passes] == ["prune", "onnx", "ptq", "trt"]
        assert found.passes[0] == Prune(ratio=0.3, scope="uniform", bn_utterances=8)
        assert found.folder == finished_run
        assert found.to_mapping() == yaml.safe_load((finished_run / "run.yaml").read_text())

    def test_events_are_json_lines_in_order(self, finished_run: Path) -> None:
        events = [json.loads(line) for line in (finished_run / "events.jsonl").read_text().splitlines()]
        kinds = [event["event"] for event in events]
        assert (kinds[0], kinds[-1]) == ("start", "done")
        assert [event["step"] for event in events if event["event"] == "measured"] == list(self.STEPS)
        assert [event["time"] for event in events] == sorted(event["time"] for event in events)

    def test_the_report_is_one_page_with_every_variant(self, finished_run: Path) -> None:
        page = (finished_run / "report.html").read_text()
        assert page.lstrip().lower().startswith("<!doctype html>")
        assert "prune+ptq+trt" in page.replace("<wbr>", "")
        assert "http://" not in page.replace("http://www.w3.org", "")

    def test_tables_agree(self, finished_run: Path, content: dict[str, Any]) -> None:
        markdown = (finished_run / "table.md").read_text()
        assert markdown.startswith(table.to_markdown(content["rows"]))
        sentences = [*summarize(content), table.reason(content["rows"][-1])]
        assert markdown.split("\n\n")[1:] == [*sentences[:-1], sentences[-1] + "\n"]
        assert (finished_run / "table.csv").read_text() == table.to_csv(content["rows"])

    def test_a_change_late_in_the_chain_keeps_what_is_before_it(
        self, finished_run: Path, tmp_path: Path, lasting: Callable[[Path], dict[str, Any]]
    ) -> None:
        shutil.copytree(finished_run, tmp_path / "run")
        config = from_mapping(read_yaml(finished_run / "run.yaml") | {"out": str(tmp_path / "run")}, "run.yaml")
        found, said = resume(replace(config, passes=(*config.passes[:-1], TRT(max_batch=2))))
        for step in self.STEPS[:-1]:
            assert said.of(step) == f"{step}: unchanged, taken from the earlier run"
        assert "made anew" in said.of("04-trt")
        assert found["rows"][-1]["settings"]["max_batch"] == 2
        assert lasting(tmp_path / "run")["rows"][:-1] == lasting(finished_run)["rows"][:-1]


class TestResume:
    def test_an_unchanged_run_is_taken_over_and_says_so(self, done: RunConfig, tiny_run: Path) -> None:
        found, said = resume(done)
        before = json.loads((tiny_run / "table.json").read_text())
        assert found["rows"] == before["rows"]  # the timings too
        for step in ("00-baseline", "01-ptq", "02-trt"):
            assert said.of(step) == f"{step}: unchanged, taken from the earlier run"
        assert not any("timing" in line for line in said.lines)

    def test_the_report_of_a_resumed_run_has_all_curves(self, done: RunConfig, tiny_run: Path) -> None:
        resume(done)
        strip = [(folder / "report.html").read_text().count("<path") for folder in (done.folder, tiny_run)]
        assert strip[0] == strip[1] > 0

    def test_a_changed_setting_redoes_that_step_and_the_following(self, done: RunConfig) -> None:
        found, said = resume(replace(done, passes=(PTQ(utterances=9), TRT())))
        assert said.of("00-baseline").endswith("unchanged, taken from the earlier run")
        for step in ("01-ptq", "02-trt"):
            assert "its input, settings, data or code changed; made anew" in said.of(step)
        assert found["rows"][1]["settings"]["utterances"] == 9

    @pytest.mark.parametrize("name", ["trials", pytest.param("utt2spk", marks=pytest.mark.slow), "calib.scp", "audio"])
    def test_changed_data_redo_every_step(self, done: RunConfig, own_speech: Path, name: str) -> None:
        own = replace(done, data=str(own_speech))
        shutil.rmtree(own.folder)
        run(own)
        if name == "audio":
            path = sorted((own_speech / "wav").iterdir())[0]
            soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
        else:
            lines = (own_speech / name).read_text().splitlines(True)
            (own_speech / name).write_text("".join(lines[:-1] if name != "utt2spk" else [*lines[:-1], "x other\n"]))
            if name == "utt2spk":
                lines[-1] = lines[-1].split()[0] + " other\n"
                (own_speech / name).write_text("".join(lines))
        _, said = resume(own)
        for step in ("00-baseline", "01-ptq", "02-trt"):
            assert "made anew" in said.of(step)

    def test_another_model_redoes_every_step(self, done: RunConfig, tiny_run: Path, tmp_path: Path) -> None:
        import onnx

        graph = onnx.load(done.model)
        graph.graph.initializer[0].raw_data = bytes(len(graph.graph.initializer[0].raw_data) - 4) + b"\0\0\x80?"
        onnx.save(graph, str(tmp_path / "other.onnx"))
        _, said = resume(replace(done, model=str(tmp_path / "other.onnx")))
        assert "made anew" in said.of("00-baseline")

    def test_other_code_redoes_every_step(self, done: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline, "code_hash", lambda: "other")
        _, said = resume(done)
        for step in ("00-baseline", "01-ptq", "02-trt"):
            assert "made anew" in said.of(step)

    def test_the_data_may_be_named_by_another_path(
        self, done: RunConfig, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(speech_folder.parent)
        _, said = resume(replace(done, data=speech_folder.name))
        assert "unchanged" in said.of("02-trt")

    def test_other_threads_are_timed_anew_and_said(self, done: RunConfig) -> None:
        found, said = resume(replace(done, threads=2))
        assert "unchanged" in said.of("01-ptq")
        assert any("timing 2 variants side by side, 2 thread(s)" in line for line in said.lines)
        assert [row["threads"] for row in found["rows"]] == [2, 2, None]
        assert found["machine"]["threads"] == 2

    @pytest.mark.parametrize(
        "damage",
        [
            lambda step: (step / "model.onnx").write_bytes(b"x"),
            lambda step: (step / "model.onnx").unlink(),
            lambda step: (step / "artifact.json").write_text("{"),
            lambda step: (step / "embeddings-onnxruntime.npy").unlink(),
            lambda step: os.truncate(step / "embeddings-onnxruntime.npy", 200),
            lambda step: (step / "step.json").write_text("{"),
            lambda step: (step / "step.json").write_text("[]"),
            lambda step: (step / "step.json").unlink(),
        ],
    )
    @pytest.mark.parametrize("step", ["00-baseline", "01-ptq"])
    def test_a_damaged_step_is_made_anew(
        self,
        done: RunConfig,
        tiny_run: Path,
        damage: Callable[[Path], object],
        step: str,
        lasting: Callable[[Path], dict[str, Any]],
    ) -> None:
        damage(done.folder / step)
        _, said = resume(done)
        assert "unchanged" not in said.of(step)
        assert lasting(done.folder) == lasting(tiny_run)

    def test_a_step_that_was_made_but_not_measured_is_measured(
        self, done: RunConfig, tiny_run: Path, lasting: Callable[[Path], dict[str, Any]]
    ) -> None:
        record = done.folder / "01-ptq" / "step.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"rows": None}))
        shutil.rmtree(done.folder / "02-trt")
        for name in ("timings.json", "table.json", "report.html"):
            (done.folder / name).unlink()
        _, said = resume(done)
        assert said.of("01-ptq") == "01-ptq: made by the earlier run, measuring it"
        assert lasting(done.folder) == lasting(tiny_run)

    def test_what_a_killed_run_was_writing_is_cleared_away(self, done: RunConfig) -> None:
        (done.folder / ".01-ptq.abc123.tmp").mkdir()
        (done.folder / ".01-ptq.abc123.tmp" / "model.onnx").write_bytes(b"half")
        (done.folder / ".table.json.abc123.tmp").write_text("{")
        resume(done)
        assert not temporaries(done.folder)

    def test_a_run_killed_before_its_first_file_is_no_obstacle(self, config: RunConfig) -> None:
        config.folder.mkdir()
        (config.folder / ".run.yaml.abc123.tmp").write_text("pas")
        assert run(config)["rows"][0]["status"] == "ok"
        assert not temporaries(config.folder)

    def test_a_result_of_other_settings_does_not_stay_when_the_step_fails(
        self, tiny_run: Path, done: RunConfig, tmp_path: Path
    ) -> None:
        folder = done.folder / "01-refuse"
        shutil.copytree(done.folder / "01-ptq", folder)
        found, _ = resume(replace(done, passes=(Refuse(), TRT())))
        assert [row["status"] for row in found["rows"]] == ["ok", "failed", "failed"]
        assert not folder.exists()

    def test_steps_that_are_not_planned_any_more_are_removed_and_said(self, done: RunConfig) -> None:
        (done.folder / "05-notes").mkdir()
        found, said = resume(replace(done, passes=(TRT(),)))
        assert [row["variant"] for row in found["rows"]] == ["baseline", "trt"]
        folders = {path.name for path in done.folder.iterdir() if path.is_dir()}
        assert folders == {"00-baseline", "01-trt", "05-notes"}
        for step in ("01-ptq", "02-trt"):
            assert said.of(step) == f"{step}: not among the passes any more, removed"

    @pytest.mark.parametrize(
        "content",
        ["{", *(pytest.param(text, marks=pytest.mark.slow) for text in ("[]", "{}")), '{"key": 1, "rows": 2}'],
    )
    def test_damaged_timings_are_measured_anew(self, done: RunConfig, content: str) -> None:
        (done.folder / "timings.json").write_text(content)
        found, said = resume(done)
        assert any("timing 2 variants" in line for line in said.lines)
        assert found["rows"][0]["latency_ms"]["p50"] > 0

    def test_other_versions_redo_every_step(self, done: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline, "versions", lambda: {"torch": "0"})
        _, said = resume(done)
        assert "made anew" in said.of("00-baseline")

    def test_another_source_of_a_pass_redoes_its_step(self, done: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline, "source_hash", lambda kind: "other")
        _, said = resume(done)
        assert "unchanged" in said.of("00-baseline")
        assert "made anew" in said.of("01-ptq")

    def test_a_pass_is_given_the_same_threads_after_a_resume(self, config: RunConfig) -> None:
        asked = replace(config, passes=(Threads(),))
        with torch_threads(1):
            fresh = run(asked)["rows"][1]["notes"]
            assert torch.get_num_threads() == 1
        assert fresh == [f"{machine.cores()} threads"]
        (config.folder / "01-threads" / "step.json").unlink()
        with torch_threads(machine.cores() + 1):
            assert resume(asked)[0]["rows"][1]["notes"] == fresh

    def test_a_file_that_a_pass_reads_redoes_its_step_when_it_changes(self, config: RunConfig, tmp_path: Path) -> None:
        path = tmp_path / "channels.json"
        asked = replace(config, passes=(Reader(str(path)),))
        with pytest.raises(InputError, match=r"channels\.json: no such file; reader was told to read it\."):
            plan(asked)
        path.write_text("first")
        speakers = DataFolder.read(str(config.data)).speakers
        calibrated = DataFolder.read(str(config.data)).calibration().utterances
        expected = " ".join(speakers[utterance] for utterance in calibrated)
        assert run(asked)["rows"][1]["notes"][:2] == ["first", expected]
        assert "unchanged" in resume(asked)[1].of("01-reader")
        path.write_text("second")
        again, said = resume(asked)
        assert "made anew" in said.of("01-reader")
        assert again["rows"][1]["notes"][0] == "second"

    def test_without_resume_nothing_is_taken_over(self, done: RunConfig) -> None:
        with pytest.raises(InputError, match=r"run holds a run already\. Go on with it by --resume, or choose another"):
            run(done)

    def test_resume_of_nothing_begins(self, config: RunConfig) -> None:
        found, said = resume(config)
        assert [row["status"] for row in found["rows"]] == ["ok", "ok", "deferred"]
        assert not any("earlier" in line for line in said.lines)


class TestFailure:
    def test_a_failed_pass_is_a_row_and_what_follows_is_not_tried(self, config: RunConfig) -> None:
        found = run(replace(config, passes=(Refuse(), TRT())))
        baseline, refuse, trt = found["rows"]
        assert baseline["status"] == "ok"
        assert (refuse["status"], refuse["reason"]) == ("failed", "refuse takes nothing.")
        assert (trt["status"], trt["reason"]) == ("failed", "not tried, because refuse failed.")
        for figures in (refuse, trt):
            assert list(figures) == list(table.FIELDS)
            assert figures["eer"] is figures["precision"] is figures["artifact"] is None
        assert "failed" in (config.folder / "table.md").read_text()
        assert "not tried, because refuse failed." in (config.folder / "table.md").read_text()
        assert "not tried, because refuse failed." in (config.folder / "report.html").read_text()
        assert '"event": "failed"' in (config.folder / "events.jsonl").read_text()

    def test_unmeasured_memory_does_not_lose_the_table(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "executable", shutil.which("false"))  # every process that is started ends with 1
        first, *_ = run(replace(config, passes=(TRT(),)))["rows"]
        assert first["latency_ms"]["p50"] > 0
        assert first["peak_rss_bytes"] is None
        assert first["notes"][-1].startswith("peak memory was not measured: the process that measured the peak memory")

    def test_unusable_audio_leaves_nothing_on_disk(self, config: RunConfig, own_speech: Path) -> None:
        path = sorted((own_speech / "wav").iterdir())[3]
        soundfile.write(path, np.zeros(16000), 16000)
        deep = replace(config, data=str(own_speech), passes=(TRT(),), out=str(config.folder / "a" / "b"))
        with pytest.raises(InputError, match=r"is digital silence throughout"):
            run(deep)
        assert not config.folder.exists()

    def test_a_folder_that_was_there_stays_empty(self, config: RunConfig, own_speech: Path) -> None:
        path = sorted((own_speech / "wav").iterdir())[3]
        soundfile.write(path, np.zeros(16000), 16000)
        config.folder.mkdir()
        with pytest.raises(InputError, match=r"is digital silence throughout"):
            run(replace(config, data=str(own_speech), passes=(TRT(),)))
        assert list(config.folder.iterdir()) == []

    def test_an_earlier_run_stays_when_its_data_break(self, done: RunConfig, own_speech: Path) -> None:
        path = sorted((own_speech / "wav").iterdir())[3]
        soundfile.write(path, np.zeros(16000), 16000)
        with pytest.raises(InputError, match=r"is digital silence throughout"):
            resume(replace(done, data=str(own_speech), passes=(TRT(),)))
        assert (done.folder / "01-ptq" / "model.onnx").is_file()


class TestPlan:
    def test_planning_writes_nothing(self, config: RunConfig) -> None:
        planned = plan(config)
        assert [step.folder.name for step in planned.steps] == ["00-baseline", "01-ptq", "02-trt"]
        assert [step.variant for step in planned.steps] == ["baseline", "ptq", "ptq+trt"]
        assert not config.folder.exists()

    def test_the_default_folder_is_named_after_the_passes_that_were_asked(
        self, small_checkpoint: Path, speech_folder: Path
    ) -> None:
        asked = RunConfig((PTQ(utterances=8),), str(small_checkpoint), "campplus", data=str(speech_folder))
        planned = plan(asked)
        assert planned.config.folder == asked.folder == Path("runs/small-ptq")
        assert [step.folder.name for step in planned.steps] == ["00-baseline", "01-onnx", "02-ptq"]
        assert [step.variant for step in planned.steps] == ["baseline", "onnx", "ptq"]

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"model": "camplus"}, SettingError, r"unknown model 'camplus'\. Did you mean 'campplus'\?"),
            (
                {"model": "no/such"},
                ModelError,
                r"no/such: no such model\. A checkpoint, artifact folder or \.onnx file",
            ),
            ({"model": "none.onnx"}, ModelError, r"none\.onnx: no such ONNX file"),
            ({"data": "no/such"}, InputError, r"no/such: no such data folder"),
            ({"trials": "trials_x"}, InputError, r"no trial list 'trials_x': .* has trials, and it is not the path"),
            ({"calib": "no.scp"}, InputError, r"no\.scp: no such file"),
            ({"passes": (PTQ(), PTQ())}, ModelError, r"ptq takes an fp32 graph; this one is int8 already\."),
            ({"passes": (Prune(),)}, SettingError, r"prune takes torch, but there is onnx before it"),
            (
                {"passes": (PTQ(utterances=19),)},
                InputError,
                r"ptq asks for 19 calibration utterances, the list has 18\. Give a longer --calib list",
            ),
        ],
    )
    def test_what_can_be_known_before_is_said_before(
        self, config: RunConfig, changes: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        with pytest.raises(kind, match=message):
            plan(replace(config, **changes))

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (Path.unlink, r": no such audio file; the calibration list names it"),
            (lambda path: path.write_bytes(b""), r" is an empty file"),
            (lambda path: soundfile.write(path, np.zeros(16000), 16000), r" is digital silence throughout"),
            (lambda path: soundfile.write(path, np.ones(200) / 2, 16000), r": waveform has 200 samples"),
            (
                lambda path: soundfile.write(path, np.ones(600) / 2, 16000),
                r": 2 frames are too short to calibrate with",
            ),
            (lambda path: soundfile.write(path, np.full(9999, np.nan), 16000, subtype="FLOAT"), r" holds NaN"),
        ],
    )
    def test_calibration_audio_is_read_before(
        self, config: RunConfig, own_speech: Path, damage: Callable[[Path], object], message: str
    ) -> None:
        first = sorted((own_speech / "wav").iterdir())[0]
        shutil.copy(first, own_speech / "extra.wav")
        others = (own_speech / "calib.scp").read_text().splitlines(keepends=True)[:7]  # eight in all: each is used
        (own_speech / "more.scp").write_text("".join(["extra extra.wav\n", *others]))
        damage(own_speech / "extra.wav")
        with pytest.raises(InputError, match=r"extra\.wav" + message):
            plan(replace(config, data=str(own_speech), calib=str(own_speech / "more.scp")))

    def test_a_pass_that_needs_no_calibration_needs_no_list(self, config: RunConfig, own_speech: Path) -> None:
        (own_speech / "calib.scp").unlink()
        assert len(plan(replace(config, data=str(own_speech), passes=(Optimize(),))).calibration) == 0
        with pytest.raises(InputError, match=r"has no calib\.scp\. Name a calibration list with --calib FILE\."):
            plan(replace(config, data=str(own_speech)))

    def test_data_in_the_current_folder_have_a_name(
        self, config: RunConfig, own_speech: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(own_speech)
        assert plan(replace(config, data=".")).data_label == "speech"
        assert plan(replace(config, data=None)).data_label == "embedded"

    def test_cuda_is_refused_without_a_gpu(self, config: RunConfig) -> None:
        if pipeline.machine.probe_cuda().missing is None:
            pytest.skip("this machine has a GPU")
        with pytest.raises(MachineError, match=r"device cuda: .*\. Use --device cpu\."):
            plan(replace(config, device="cuda"))


def test_a_threshold_is_fitted_on_the_trials_of_this_run(config: RunConfig, own_speech: Path, tiny_run: Path) -> None:
    lines = (own_speech / "trials").read_text().splitlines(True)
    (own_speech / "trials_half").write_text("".join(lines[::2]))
    model = tiny_run / "00-baseline"  # has a threshold of the full list
    found = run(replace(config, model=str(model), data=str(own_speech), trials="trials_half", passes=(TRT(),)))
    artifact = Artifact.load(config.folder / "00-baseline")
    assert artifact.threshold is not None
    assert (artifact.threshold.trials, artifact.threshold.data) == ("trials_half", "speech")
    assert artifact.threshold.value == found["rows"][0]["threshold"]
    assert artifact.metrics["n_trials"] == found["rows"][0]["n_trials"] == 77


def test_a_run_starts_from_an_artifact_folder(config: RunConfig, tiny_run: Path) -> None:
    found = run(replace(config, model=str(tiny_run / "01-ptq"), passes=(TRT(),)))
    assert [row["precision"] for row in found["rows"]] == ["int8", "int8"]
    artifact = Artifact.load(config.folder / "01-trt")
    assert artifact.format == Format.TENSORRT
    assert [step.name for step in artifact.history] == ["ptq", "trt"]


def test_golden_outputs_are_of_real_speech(tiny_run: Path) -> None:
    artifact = Artifact.load(tiny_run / "00-baseline")
    whole, short = artifact.golden["features_0"], artifact.golden["features_1"]
    assert whole.shape == (1, 98, 80)
    assert short.shape == (1, 88, 80)
    np.testing.assert_allclose(open_runner(artifact).run(whole), artifact.golden["embedding_0"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("content", ["notes.txt", "deep/run.yaml"])
def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("mine")
    for resume_or_not in (False, True):
        with pytest.raises(InputError, match=r"is not empty and not a run\. Choose another --out folder\."):
            claim_folder(tmp_path, resume_or_not)
    assert (tmp_path / content).read_text() == "mine"


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(MachineError, match=r"cannot be made \(.*\)\. Choose another --out folder\."):
            claim_folder(place, resume=False)


def test_a_full_disk_is_said(config: RunConfig, small_disk: Path) -> None:
    with pytest.raises(MachineError, match=r"disk full while writing .*\. Free some space, then try again\."):
        run(replace(config, out=str(small_disk / "run")))
    assert not temporaries(small_disk)


def metadata_of(artifact: Artifact) -> dict[str, str]:
    data = artifact.files["portable.onnx"] if artifact.deferred else artifact.onnx
    return {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}


@pytest.fixture(scope="module")
def waveform_run(tiny_graph: Path, speech_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``ptq`` over the tiny graph with the front end in it."""
    folder = tmp_path_factory.mktemp("waveform")
    joined = join_front_end(front_end_graph(FrontEnd(), 18), onnx.load(tiny_graph))
    told = {"sample_rate": "16000", "num_mel_bins": "80", "feature_normalize_type": "global-mean"}
    onnx.helper.set_model_props(joined, told)
    onnx.save(joined, str(folder / "tiny.onnx"))
    passes = (PTQ(utterances=8),)
    run(RunConfig(passes, str(folder / "tiny.onnx"), data=str(speech_folder), out=str(folder / "run"), timing_s=0.0))
    return folder / "run"


def test_front_end_in_the_graph_gives_the_figures_of_the_one_in_python(waveform_run: Path, tiny_run: Path) -> None:
    (inside, quantized), (outside, *_) = (
        json.loads((folder / "table.json").read_text())["rows"] for folder in (waveform_run, tiny_run)
    )
    assert inside["eer"] == pytest.approx(outside["eer"], abs=1e-3)
    assert inside["params"] == outside["params"]
    assert quantized["precision"] == "int8"
    assert quantized["cosine_min"] > 0.99
    for figures in (inside, quantized):
        assert figures["status"] == "ok"
        assert figures["peak_rss_bytes"] > 0
        assert "the latency of the model includes the front end, which is in its graph" in figures["notes"]
    assert not [note for note in outside["notes"] if "includes the front end" in note]


def test_golden_inputs_are_waveforms_where_the_front_end_is_in_the_graph(waveform_run: Path) -> None:
    for step in ("00-baseline", "01-ptq"):
        artifact = Artifact.load(waveform_run / step)
        assert artifact.front_end.in_graph
        assert [artifact.golden[f"waveform_{i}"].ndim for i in (0, 1)] == [2, 2]
        assert golden_cosine(open_runner(artifact), artifact) >= GOLDEN_COSINE


def test_onnx_file_tells_the_threshold_that_was_measured_on_it_and_no_other(tiny_run: Path) -> None:
    for step in ("00-baseline", "01-ptq"):
        artifact = Artifact.load(tiny_run / step)
        assert artifact.threshold is not None
        assert float(metadata_of(artifact)["threshold"]) == pytest.approx(artifact.threshold.value, abs=1e-6)
    assert "threshold" not in metadata_of(Artifact.load(tiny_run / "02-trt"))  # nothing was measured on it


def test_what_is_assumed_of_a_foreign_file_stands_in_its_row(
    foreign_graph: Path, speech_folder: Path, waveform_run: Path, tmp_path: Path
) -> None:
    config = RunConfig(
        (PTQ(utterances=4),), str(foreign_graph), data=str(speech_folder), out=str(tmp_path / "run"), timing_s=0.0
    )
    (note,) = [note for note in run(config)["rows"][0]["notes"] if "assumed" in note]
    assert "assumed is Fbank of 80 bins at 16000 Hz minus its mean over the utterance" in note
    rows = json.loads((waveform_run / "table.json").read_text())["rows"]
    assert not [note for row in rows for note in row["notes"] if "assumed" in note]


def test_a_budget_that_is_not_met_fails_the_step_and_keeps_the_nearest(
    tiny_graph: Path, speech_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    maker = PTQ(utterances=4, max_eer_rise=-0.9)
    config = RunConfig((maker,), str(tiny_graph), data=str(speech_folder), out=str(out), timing_s=0.0)
    *_, failed = run(config)["rows"]
    assert failed["status"] == "failed"
    assert failed["reason"].startswith("ptq: the budget cannot be met: EER ")
    assert Artifact.load(out / "01-ptq").precision == "int8"
    *_, again = run(config, resume=True)["rows"]
    assert again["status"] == "failed"


@pytest.mark.parametrize("name", ["distill", "finetune"])
def test_nothing_is_measured_on_what_is_learned_from(
    name: str, small_campplus: Artifact, speech_folder: Path, own_speech: Path, other_speech: Path, tmp_path: Path
) -> None:
    small_campplus.save(tmp_path / "small")

    def planned(**settings: object) -> Plan:
        values = {"model": str(tmp_path / "small"), "data": str(speech_folder), "passes": [{name: settings}]}
        return plan(from_mapping(values, "test"))

    message = rf"{name} would learn from 18 of the 18 utterances that the run measures on, one is .*\.wav; the EER"
    for learned in ({"data": str(speech_folder)}, {"data": str(own_speech)}, {"utterances": 18}):
        with pytest.raises(InputError, match=message):
            planned(**learned)
    per_speaker = tmp_path / "own"
    for line in (own_speech / "utt2spk").read_text().splitlines():
        utterance, speaker = line.split()
        (per_speaker / speaker).mkdir(parents=True, exist_ok=True)
        (own_speech / "wav" / f"{utterance}.wav").rename(per_speaker / speaker / f"{utterance}.wav")
    with pytest.raises(InputError, match=message):
        planned(data=str(per_speaker))
    told = planned(data=str(other_speech)).warnings
    assert told == (
        ()
        if name == "finetune"
        else (
            "warning: distill learns from other utterances of 6 of the 6 speakers of the trials; the EER of strangers"
            " may be higher.",
        )
    )


def test_a_step_is_another_one_when_audio_of_a_folder_per_speaker_changes(own_speech: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    file = (own_speech / "wav").rename(tmp_path / "own" / "anna") / "new.wav"
    before = _identity(Finetune(data=str(tmp_path / "own")), DataFolder(tmp_path, {}))
    assert before == _identity(Finetune(data=str(tmp_path / "own")), DataFolder(tmp_path, {}))
    shutil.copy(next(file.parent.iterdir()), file)
    added = _identity(Finetune(data=str(tmp_path / "own")), DataFolder(tmp_path, {}))
    file.write_bytes(file.read_bytes()[:-2])
    changed = _identity(Finetune(data=str(tmp_path / "own")), DataFolder(tmp_path, {}))
    assert before != added != changed != before
