"""The networks known by name, and loading their checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Size, nn

from compress.errors import ModelError, SettingError, unknown_name
from compress.models import campplus, ecapa_tdnn, eres2net, eres2netv2, fsmn_vad, resnet34, tdnn_blstm
from compress.models.checkpoint import load_into, read_state_dict

WEIGHTS = Path(__file__).parent / "weights"

# sherpa-onnx needs both keys; a checkpoint of 3D-Speaker does not tell its language.
SHERPA = {"framework": "3d-speaker", "language": "unknown"}

# Under it, statistics over time are not defined after a stride of 2. A float network gives NaN then, but a
# quantized one gives numbers that mean nothing.
MIN_FRAMES = 3
STRIDED_MIN_FRAMES = 9  # the same after three strides of 2

Shapes = Mapping[str, Size]


@dataclass(frozen=True)
class Architecture:
    """A network known by name.

    Attributes:
        build: Makes it from its arguments; all have defaults.
        infer_arguments: Reads the arguments off the shapes of a state dict; raises KeyError for a foreign one.
        min_frames: The shortest input that gives an embedding.
        onnx_metadata: What deployed programs look for in its ONNX files beside the keys that every file gets.
    """

    name: str
    task: str
    summary: str
    build: Callable[..., nn.Module]
    infer_arguments: Callable[[Shapes], dict[str, Any]]
    onnx_metadata: Mapping[str, str] = field(default_factory=dict)
    min_frames: int = MIN_FRAMES

    @property
    def weights(self) -> Path | None:
        """Folder of the embedded trained artifact, where there is one."""
        folder = WEIGHTS / self.name
        return folder if folder.is_dir() else None


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "campplus",
            "sv",
            "CAM++: D-TDNN with context-aware masking, 80 mel bins",
            campplus.CAMPPlus,
            campplus.infer_arguments,
            {"framework": "3d-speaker", "language": "English"},  # sherpa-onnx needs both; English as the weights
        ),
        Architecture(
            "tdnn_blstm",
            "sv",
            "TDNN, bidirectional LSTM and self-attentive pooling, 80 mel bins",
            tdnn_blstm.TDNNBLSTM,
            tdnn_blstm.infer_arguments,
            SHERPA,
        ),
        Architecture(
            "ecapa_tdnn",
            "sv",
            "ECAPA-TDNN of 1024 channels, 80 mel bins",
            ecapa_tdnn.ECAPATDNN,
            ecapa_tdnn.infer_arguments,
            SHERPA,
            ecapa_tdnn.MIN_FRAMES,
        ),
        Architecture(
            "eres2net",
            "sv",
            "ERes2Net with local and global feature fusion, 80 mel bins",
            eres2net.ERes2Net,
            eres2net.infer_arguments,
            SHERPA,
            STRIDED_MIN_FRAMES,
        ),
        Architecture(
            "eres2netv2",
            "sv",
            "ERes2NetV2 with bottom-up feature fusion, 80 mel bins",
            eres2netv2.ERes2NetV2,
            eres2netv2.infer_arguments,
            SHERPA,
            STRIDED_MIN_FRAMES,
        ),
        Architecture(
            "resnet34",
            "sv",
            "ResNet34 with statistics pooling, 80 mel bins",
            resnet34.ResNet34,
            resnet34.infer_arguments,
            SHERPA,
            STRIDED_MIN_FRAMES,
        ),
        Architecture(
            "fsmn_vad",
            "vad",
            "FSMN-VAD, 5 x 80 mel bins at a low frame rate",
            fsmn_vad.FSMNVAD,
            fsmn_vad.infer_arguments,
        ),
    )
}


def architecture(name: str) -> Architecture:
    """Look up a network by name.

    Raises:
        SettingError: If there is none; the nearest name is offered.
    """
    if name not in ARCHITECTURES:
        raise unknown_name("model", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def load_model(path: Path | str, arch: str | None = None, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Load a checkpoint in the layout of its authors.

    Args:
        path: Flat state dict: ``.bin``, ``.ckpt``, ``.pt``, ``.pth`` or ``.safetensors``.
        arch: Name of the network; ``compress models`` lists them.
        arguments: Of the network's constructor, where the shapes of the weights do not tell them: the strides of
            ``fsmn_vad``. They go before what is read off the shapes.

    Returns:
        The network in eval mode: (batch, frames, num_mel_bins) -> (batch, embedding_size); for voice activity,
        (batch, frames, features) -> posteriors (batch, frames, classes).

    Raises:
        SettingError: If ``arch`` is missing or unknown, or ``arguments`` hold an unknown name.
        ModelError: If the checkpoint cannot be read or does not fit.
    """
    model, _ = load_with_arguments(Path(path), arch, arguments)
    return model


def load_with_arguments(
    path: Path, arch: str | None, given: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a checkpoint as :func:`load_model` does; also return the arguments that rebuild the network."""
    if str(path) in ARCHITECTURES and not path.is_file():
        raise SettingError(
            f"{path} is the name of a network and not a checkpoint. Its embedded weights are in"
            f" compress.Artifact.open('{path}').module; compress.load('{path}') gives them ready to use."
        )
    if arch is None:
        raise SettingError(f"{path} is a checkpoint: say which network it belongs to with --arch NAME.")
    network = architecture(arch)
    state = read_state_dict(path)
    try:
        inferred = network.infer_arguments({key: value.shape for key, value in state.items()})
        for name in given or ():
            if name not in inferred:
                raise unknown_name(f"argument of {arch}", name, inferred)
        arguments = {**inferred, **(given or {})}
        model = network.build(**arguments)
    except KeyError as error:
        raise ModelError(f"{path} does not fit {arch}: missing {error.args[0]}. Is --arch right?") from error
    except (IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(
            f"{path} does not fit {arch}: its shapes give no network ({error}). Is --arch right?"
        ) from error
    load_into(model, state, str(path))
    return model.eval(), arguments
