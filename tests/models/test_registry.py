"""Networks known by name, and loading their checkpoints."""

import re
from pathlib import Path

import pytest
import torch

from compress.errors import ModelError, SettingError
from compress.models import ARCHITECTURES, architecture, load_model, load_with_arguments


@pytest.fixture
def state(small_campplus) -> dict[str, torch.Tensor]:
    return dict(small_campplus.module.state_dict())


def saved(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.bin")
    return folder / "weights.bin"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_has_a_name_a_task_and_a_summary(name: str) -> None:
    entry = architecture(name)
    assert entry.name == name
    assert entry.task in ("sv", "vad", "asr")
    assert entry.summary
    assert entry.weights is None or (entry.weights / "artifact.json").is_file()


def test_documentation_lists_every_network_with_its_size() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\d,]+) \| (?:(\d+) frames)? *\|", page, re.M)
    expected = []
    for name, entry in ARCHITECTURES.items():
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in entry.build().parameters())
        expected.append((name, entry.task, f"{parameters:,}", str(entry.min_frames) if entry.task == "sv" else ""))
    assert rows == expected


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"unknown model 'camplus'\. Did you mean 'campplus'\?"):
        architecture("camplus")
    with pytest.raises(SettingError, match=r"unknown model 'wav2vec'\. Known: .*campplus"):
        architecture("wav2vec")


@torch.inference_mode()
def test_checkpoint_loads_into_the_network_it_was_saved_from(small_campplus, state, tmp_path: Path) -> None:
    model, arguments = load_with_arguments(saved(state, tmp_path), "campplus")
    assert not model.training
    assert {key: arguments[key] for key in small_campplus.arguments} == small_campplus.arguments
    features = torch.randn(2, 130, 80)
    assert torch.equal(model(features), small_campplus.module(features))


def test_checkpoint_without_its_network_says_which_option_names_it(state, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    with pytest.raises(SettingError, match=r"weights\.bin is a checkpoint: say which network .* with --arch NAME\."):
        load_model(path)
    with pytest.raises(SettingError, match=r"Did you mean 'campplus'\?"):
        load_model(path, arch="campp")


def test_missing_key_is_named(state, tmp_path: Path) -> None:
    del state["head.bn1.weight"]
    with pytest.raises(ModelError, match=r"does not fit CAMPPlus: missing head\.bn1\.weight\. Is --arch right\?"):
        load_model(saved(state, tmp_path), arch="campplus")


def test_missing_key_that_tells_the_width_is_named(state, tmp_path: Path) -> None:
    del state["xvector.tdnn.linear.weight"]
    with pytest.raises(
        ModelError, match=r"weights\.bin does not fit campplus: missing xvector\.tdnn\.linear\.weight\."
    ):
        load_model(saved(state, tmp_path), arch="campplus")


def test_extra_key_is_named(state, tmp_path: Path) -> None:
    state["classifier.weight"] = torch.zeros(10, 192)
    with pytest.raises(ModelError, match=r"does not fit CAMPPlus: extra classifier\.weight\. "):
        load_model(saved(state, tmp_path), arch="campplus")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("xvector.block2.tdnnd3.cam_layer.linear1.weight", (3, 7, 1)),
        ("xvector.tdnn.linear.weight", ()),
        ("xvector.tdnn.linear.weight", (64,)),
        ("xvector.tdnn.linear.weight", (0, 320, 5)),
        ("head.conv2.weight", (0, 32, 3, 3)),
        ("head.conv2.weight", (7, 32, 3, 3)),
        ("xvector.block1.tdnnd1.cam_layer.linear_local.weight", (0, 32, 3)),
        ("xvector.dense.linear.weight", (0, 512, 1)),
    ],
)
def test_misshaped_key_is_told(state, tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    state[key] = torch.zeros(shape)
    with pytest.raises(ModelError, match=r"weights\.bin(: .* has shape \[.*\], CAMPPlus needs \[| does not fit)"):
        load_model(saved(state, tmp_path), arch="campplus")


def test_checkpoint_of_another_network_is_refused(fresh_tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights\.bin does not fit campplus: missing .*Is --arch right\?"):
        load_model(saved(fresh_tiny().state_dict(), tmp_path), arch="campplus")


@pytest.mark.parametrize("arch", [None, "campplus"])
def test_a_name_is_no_checkpoint(arch: str | None) -> None:
    with pytest.raises(
        SettingError, match=r"name of a network and not a checkpoint.*Artifact\.open\('campplus'\)\.module"
    ):
        load_model("campplus", arch)
