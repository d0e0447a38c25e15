"""Static INT8: small, near to the float graph, calibrated on what was asked."""

import numpy as np
import onnx
import pytest

from compress.artifact import Artifact
from compress.errors import InputError, ModelError, SettingError
from compress.machine import has_vnni
from compress.passes import PTQ, Context
from compress.passes.ptq import mean_cosine


def test_embeddings_stay_near_those_of_the_float_graph(
    tiny_onnx: Artifact, tiny_int8: Artifact, campplus_onnx: Artifact, campplus_int8: Artifact, noise, speech_features
) -> None:
    assert mean_cosine(tiny_onnx, tiny_int8, noise(10, 16, seed=3), threads=1) >= 0.995
    assert mean_cosine(campplus_onnx, campplus_int8, speech_features[12:20], threads=1) >= 0.98


def test_file_is_at_most_a_third_of_the_float_one(campplus_onnx: Artifact, campplus_int8: Artifact) -> None:
    assert campplus_int8.size_bytes <= 0.32 * campplus_onnx.size_bytes
    assert campplus_int8.params == campplus_onnx.params
    assert campplus_int8.macs == campplus_onnx.macs


def test_result_says_what_it_is(tiny_int8: Artifact, campplus_int8: Artifact) -> None:
    for artifact, weighted, utterances in ((tiny_int8, 3, 20), (campplus_int8, 225, 12)):
        assert artifact.precision == "int8"
        step = artifact.history[-1]
        assert step.name == "ptq"
        assert step.settings == {"utterances": utterances, "reduce_range": None}
        calibrated, counted, cosine = step.notes
        assert calibrated.startswith(f"calibrated on {utterances} utterances, ")
        assert f"{weighted} of {weighted} weighted operators in INT8: U8 activations, S8 weights per channel" in counted
        assert (", 7 bits" in counted) != has_vnni()
        assert cosine.startswith("cosine to the float graph ")


def test_ranges_come_from_utterances_spread_over_the_list(tiny_onnx: Artifact, noise) -> None:
    asked: list[int] = []
    features = noise(30, 16)
    PTQ(utterances=3).run(
        tiny_onnx, Context(calibration=[lambda i=i: asked.append(i) or features[i] for i in range(30)])
    )
    assert asked == [0, 10, 20]


def test_one_short_utterance_is_enough_to_calibrate(tiny_onnx: Artifact) -> None:
    short = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    result = PTQ(utterances=1).run(tiny_onnx, Context(calibration=[lambda: short]))
    onnx.checker.check_model(onnx.load_from_string(result.onnx))


def test_seven_bit_weights_on_request(tiny_onnx: Artifact, tiny_context: Context) -> None:
    notes = {bits: PTQ(4, reduce_range=bits == 7).run(tiny_onnx, tiny_context).history[-1].notes[1] for bits in (7, 8)}
    assert notes[7].endswith(", 7 bits")
    assert "7 bits" not in notes[8]


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
