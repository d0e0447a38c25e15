"""Static INT8: small, near to the float graph, calibrated on what was asked."""

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.artifact import Artifact
from compress.errors import InputError, ModelError, SettingError, UnmetBudgetError
from compress.machine import has_vnni
from compress.onnx_file import FRONT_END
from compress.passes import PTQ, Context
from compress.runners import open_runner
from compress.vectors import cosine


def mean_cosine(reference: Artifact, artifact: Artifact, utterances: list[np.ndarray]) -> float:
    a, b = (open_runner(each, 1) for each in (reference, artifact))
    return float(np.mean([cosine(a.run(u[None])[0], b.run(u[None])[0]) for u in utterances]))


def test_embeddings_stay_near_those_of_the_float_graph(
    tiny_onnx: Artifact, tiny_int8: Artifact, campplus_onnx: Artifact, campplus_int8: Artifact, noise, speech_features
) -> None:
    assert mean_cosine(tiny_onnx, tiny_int8, noise(10, 16, seed=3)) >= 0.995
    assert mean_cosine(campplus_onnx, campplus_int8, speech_features[12:20]) >= 0.999


def test_file_is_little_more_than_a_quarter_of_the_float_one(campplus_onnx: Artifact, campplus_int8: Artifact) -> None:
    assert campplus_int8.size_bytes <= 0.285 * campplus_onnx.size_bytes
    assert campplus_int8.params == campplus_onnx.params
    assert campplus_int8.macs == campplus_onnx.macs


def test_result_says_what_it_is(tiny_int8: Artifact, campplus_int8: Artifact) -> None:
    cases = ((tiny_int8, "3 of 3", 3, 20), (campplus_int8, "224 of 225", 224, 12))
    for artifact, weighted, kernels, utterances in cases:
        assert artifact.precision == "int8"
        step = artifact.history[-1]
        assert step.name == "ptq"
        assert step.settings == PTQ(utterances).settings
        notes = " | ".join(step.notes)
        assert re.match(
            rf"calibrated on {utterances} utterances, \d+ s, of \d+\.\d to \d+\.\d s, spread evenly over the list \|"
            r" ranges of \d+ tensors cover all that was seen; nothing is clipped \|",
            notes,
        )
        assert f"{weighted} weighted operators in INT8: U8 activations, S8 weights per channel" in notes
        assert (", 7 bits" in notes) != has_vnni()
        assert "(no constant weight: a product of two activations, as pooling over segments" in notes
        assert "cosine to the float graph " in notes
        ran = re.search(r"ran in ONNX Runtime: (.*) in INT8", notes)[1]
        assert sum(map(int, re.findall(r"(\d+) \w+", ran))) == kernels


def test_ranges_come_from_utterances_spread_over_the_list(tiny_onnx: Artifact, noise) -> None:
    asked: list[int] = []
    features = noise(30, 16)
    PTQ(utterances=3).run(
        tiny_onnx, Context(calibration=[lambda i=i: asked.append(i) or features[i] for i in range(30)])
    )
    assert asked == [0, 10, 20]


def test_utterances_are_chosen_by_duration_and_level_where_there_is_audio(tiny_onnx: Artifact, noise) -> None:
    asked: list[int] = []
    features = noise(30, 16)
    levels = [-20.0 - i for i in range(30)]
    context = Context(
        calibration=[lambda i=i: asked.append(i) or features[i] for i in range(30)],
        measure=lambda i: (len(features[i]) / 100, levels[i]),
    )
    note = PTQ(6, seed=3).run(tiny_onnx, context).history[-1].notes[0]
    assert asked == context.places_by_level(6, 3) != context.places_by_level(6, 0)
    used = [levels[i] for i in asked]
    frames = [len(features[i]) for i in asked]
    assert note == (
        f"calibrated on 6 utterances, {sum(frames) / 100:.0f} s, of {min(frames) / 100:.1f} to"
        f" {max(frames) / 100:.1f} s and {min(used):.0f} to {max(used):.0f} dB, chosen by length and level from 30"
        " (seed 3)"
    )


def test_one_short_utterance_is_enough_to_calibrate(tiny_onnx: Artifact) -> None:
    short = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    result = PTQ(utterances=1).run(tiny_onnx, Context(calibration=[lambda: short]))
    onnx.checker.check_model(onnx.load_from_string(result.onnx))


def test_seven_bit_weights_on_request(tiny_onnx: Artifact, tiny_context: Context) -> None:
    for bits in (7, 8):
        notes = PTQ(4, reduce_range=bits == 7).run(tiny_onnx, tiny_context).history[-1].notes
        assert any(note.endswith(", 7 bits") for note in notes) == (bits == 7)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_every_method_of_calibration_stays_near(tiny_onnx: Artifact, tiny_context: Context, noise, method: str) -> None:
    made = PTQ(8, method=method).run(tiny_onnx, tiny_context)
    assert mean_cosine(tiny_onnx, made, noise(6, 16, seed=3)) >= 0.98
    covered, narrowest, clipped, cut = re.search(
        rf"by {method} cover at least (\d+)% of the way between the extremes \((.*)\) and clip at most (\S+)% of the"
        r" values \((.*)\)",
        made.history[-1].notes[1],
    ).groups()
    assert 0 < float(covered) <= 100
    assert 0 <= float(clipped) < 5
    tensors = {name for node in onnx.load_from_string(tiny_onnx.onnx).graph.node for name in node.output} | {"feats"}
    for text in (narrowest, cut):
        assert re.search(r"(tensor|the input) '(.*?)'", text)[2] in tensors


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_other_targets_stay_near(tiny_onnx: Artifact, tiny_context: Context, noise, target: str) -> None:
    made = PTQ(8, target=target).run(tiny_onnx, tiny_context)
    assert mean_cosine(tiny_onnx, made, noise(6, 16, seed=3)) >= 0.995


def test_convolutions_over_one_axis_become_conv2d_for_tensorrt(tiny_onnx: Artifact, graph_of, noise) -> None:
    text = "a = Conv <pads = [1, 1]> (x, w)\n b = Conv (a, v)\n axis = Constant <value_ints = [2]> ()\n"
    text += "p = ReduceMean <keepdims = 0> (b, axis)\n y = MatMul (p, m)"
    model = graph_of(text, {"w": (8, 8, 3), "v": (8, 8, 1), "m": (8, 4)}, rank=2)
    plain = replace(tiny_onnx, files={"model.onnx": model.SerializeToString()})
    context = Context(calibration=[lambda features=features: features for features in noise(8, 8)])
    made = onnx.load_from_string(PTQ(8, target="tensorrt").run(plain, context).onnx)
    stored = [len(tensor.dims) for tensor in made.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert 3 not in stored
    assert stored.count(4) == 2


def fading(seed: int, duration_s: float) -> np.ndarray:
    """Noise that dies away, (samples,) at 16 kHz: features that differ from frame to frame."""
    samples = int(duration_s * 16000)
    noise = np.random.default_rng(seed).uniform(-1, 1, samples) * np.geomspace(0.5, 1e-3, samples)
    return noise.astype(np.float32)


def test_front_end_in_the_graph_stays_in_float(tiny_waveform: Artifact, tiny_onnx: Artifact) -> None:
    heard = [tiny_waveform.front_end.features(fading(seed, 0.5 + seed / 4)) for seed in range(8)]
    context = Context(calibration=[lambda features=features: features for features in heard])
    made, alone = (PTQ(8).run(artifact, context) for artifact in (tiny_waveform, tiny_onnx))
    assert (made.precision, made.front_end) == ("int8", tiny_waveform.front_end)
    notes = list(made.history[-1].notes)
    notes.remove("in float: the front end in the graph")
    assert notes[:4] == list(alone.history[-1].notes)[:4], "calibration is on features either way"
    before, after = (onnx.load_from_string(artifact.onnx) for artifact in (tiny_waveform, made))
    front = [node for node in before.graph.node if node.name.startswith(FRONT_END)]
    assert front == list(after.graph.node)[: len(front)]
    inside, outside, float_inside = (open_runner(artifact, 1) for artifact in (made, alone, tiny_waveform))
    for duration_s in (0.6, 1.7):
        waveform = fading(99, duration_s)
        embedding = inside.embed(waveform, 16000)
        assert cosine(embedding, outside.embed(waveform, 16000)) >= 0.999
        assert cosine(embedding, float_inside.embed(waveform, 16000)) >= 0.995


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Eight layers, of which one has a weight that 8 bits cannot hold."""
    rng = np.random.default_rng(0)
    lines, value, size = [], "feats", 16
    tensors = []
    for i in range(8):
        weight = rng.standard_normal((size, size)).astype(np.float32) / 4
        if i == 3:
            weight[0] *= 1000  # its input there is all but 0
        tensors.append(numpy_helper.from_array(weight, f"w{i}"))
        lines.append(f"p{i} = MatMul({value}, w{i}) r{i} = Relu(p{i})")
        value = f"r{i}"
        if i == 2:
            scale = np.ones(size, np.float32)
            scale[0] = 1e-3
            tensors.append(numpy_helper.from_array(scale, "scale"))
            lines.append("quiet = Mul(r2, scale)")
            value = "quiet"
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    deep (float[batch, frames, 16] feats) => (float[batch, 16] embedding) {{
        {" ".join(lines)} embedding = ReduceMean <axes = [1], keepdims = 0> (r7) }}"""
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.initializer.extend(tensors)
    path = tmp_path_factory.mktemp("deep") / "deep.onnx"
    onnx.save(model, str(path))
    return Artifact.from_onnx(path)


def test_sensitive_layers_stay_in_float_until_the_budget_holds(deep: Artifact, tiny_context: Context) -> None:
    plain = PTQ(8).run(deep, tiny_context)
    made = PTQ(8, min_cosine=0.999).run(deep, tiny_context)
    kept = [note for note in made.history[-1].notes if "sensitive" in note]
    assert len(kept) == 1
    assert re.match(r"in float: p3\b.* \(sensitive", kept[0])
    assert [note for note in plain.history[-1].notes if "sensitive" in note] == []
    reached = float(re.search(r"float graph ([\d.]+)", " ".join(made.history[-1].notes))[1])
    assert reached >= 0.999
    assert plain.size_bytes < made.size_bytes < deep.size_bytes


def test_a_budget_that_cannot_be_met_tells_how_close_and_keeps_the_best(deep: Artifact, tiny_context: Context) -> None:
    never = replace(tiny_context, score=lambda _: 0.05)
    with pytest.raises(
        UnmetBudgetError,
        match=r"ptq: the budget cannot be met: EER 5\.00 % \(allowed: 4\.00 %\) with the 4 most sensitive of 8 layers",
    ) as caught:
        PTQ(8, max_eer_rise=-0.01).run(deep, never)
    best = caught.value.best
    assert best.precision == "int8"
    assert mean_cosine(deep, best, [load() for load in tiny_context.calibration[:4]]) > 0.99


def test_the_budget_of_the_eer_is_asked_of_the_trials(deep: Artifact, tiny_context: Context) -> None:
    sizes: list[int] = []

    def score(artifact: Artifact) -> float:
        """An EER that is too high as long as more than two layers in three are in INT8."""
        sizes.append(artifact.size_bytes)
        weights = [
            t for t in onnx.load_from_string(artifact.onnx).graph.initializer if t.data_type == 3 and len(t.dims) > 1
        ]
        return 0.05 + 0.001 * len(weights)

    made = PTQ(8, max_eer_rise=0.0055).run(deep, replace(tiny_context, score=score))
    assert score(made) == pytest.approx(0.055)
    assert len(sizes) <= 7, "the number in float is found by halving"


def test_the_budget_of_the_eer_needs_trials(deep: Artifact, tiny_context: Context) -> None:
    with pytest.raises(InputError, match=r"ptq\.max_eer_rise needs trials to score\. Use compress run with --data"):
        PTQ(8, max_eer_rise=0.001).run(deep, tiny_context)


def test_a_dry_run_shows_what_runs_in_int8(tiny_onnx: Artifact, tiny_context: Context) -> None:
    preview = PTQ(8).preview(tiny_onnx, tiny_context)
    by_operator = {row["operator"]: row for row in preview.rows}
    assert by_operator["QLinearConv"]["count"] == 2
    assert by_operator["QLinearConv"]["multiplies in"] == "int8"
    assert preview.notes


def test_operators_that_are_kept_run_in_float(tiny_onnx: Artifact, tiny_context: Context) -> None:
    notes = " ".join(PTQ(8, keep=("Gemm", "MatMul")).run(tiny_onnx, tiny_context).history[-1].notes)
    assert "2 of 3 weighted operators in INT8" in notes
    assert "(ptq.keep=Gemm)" in notes


def test_nothing_to_quantize_is_told(tiny_onnx: Artifact, tiny_context: Context) -> None:
    with pytest.raises(ModelError, match=r"ptq: the graph has nothing to quantize of LSTM"):
        PTQ(8, operators=("LSTM",)).run(tiny_onnx, tiny_context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "tensort"}, r"unknown ptq\.target 'tensort'\. Did you mean 'tensorrt'"),
        ({"method": "minmx"}, r"unknown ptq\.method 'minmx'\. Did you mean 'minmax'"),
        ({"operators": ("Convv",)}, r"unknown type in ptq\.operators 'Convv'\. Did you mean 'Conv'"),
        ({"operators": ()}, r"ptq\.operators is empty"),
        ({"min_cosine": 1.5}, r"ptq\.min_cosine must be in \(0, 1\], got 1\.5"),
        ({"seed": -1}, r"ptq\.seed must be at least 0, got -1\."),
        ({"max_eer_rise": 3.0}, r"ptq\.max_eer_rise is a fraction \(0\.001 is 0\.1 points\), got 3\.0"),
    ],
)
def test_wrong_settings_are_told(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        PTQ(**settings)


def test_fewer_utterances_than_asked_are_told(tiny_onnx: Artifact, noise) -> None:
    context = Context(calibration=[lambda features=features: features for features in noise(7, 16)])
    with pytest.raises(
        InputError,
        match=r"ptq\.utterances: 40 calibration utterances were asked for, the list has 7\. "
        r"Give a longer --calib list or set ptq\.utterances=7\.",
    ):
        PTQ().run(tiny_onnx, context)


def test_quantized_graph_is_not_quantized_again(tiny_int8: Artifact, tiny_context: Context) -> None:
    with pytest.raises(ModelError, match=r"ptq takes an fp32 graph; this one is int8 already"):
        PTQ().run(tiny_int8, tiny_context)


@pytest.mark.parametrize("utterances", [0, -3])
def test_no_utterances_are_told(utterances: int) -> None:
    with pytest.raises(SettingError, match=rf"ptq\.utterances must be at least 1, got {utterances}"):
        PTQ(utterances=utterances)


@pytest.mark.parametrize("corrections", [True, False])
def test_layer_that_gives_nan_is_named(deep: Artifact, tiny_context: Context, corrections: bool) -> None:
    model = onnx.load_from_string(deep.onnx)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "w2")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, "w2"))
    broken = replace(deep, files={"model.onnx": model.SerializeToString()})
    with pytest.raises(
        InputError,
        match=r"tensor '\w+' of \w+ '(p2|r2|quiet)' is NaN or infinite on calibration utterance 1\. Check the",
    ):
        PTQ(4, equalize=corrections, bias_correction=corrections).run(broken, tiny_context)
