"""FSMN-VAD: feed-forward layers with a learned memory of past frames, for voice-activity detection.

Source: S. Zhang, M. Lei, Z. Yan, L. Dai, "Deep-FSMN for Large Vocabulary Continuous Speech Recognition", ICASSP 2018.
Parameter names and defaults are those of the encoder of modelscope/FunASR's streaming VAD, so its state dicts load by
key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from compress.errors import ModelError


class LinearLayer(nn.Module):
    """A linear layer."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, in_features) -> (batch, frames, out_features)."""
        y: Tensor = self.linear(x)
        return y


def filters(channels: int, order: int, stride: int) -> nn.Conv2d:
    """A filter over time for each channel: ``order`` taps, ``stride`` frames apart."""
    return nn.Conv2d(channels, channels, (order, 1), dilation=(stride, 1), groups=channels, bias=False)


class Memory(nn.Module):
    """Adds to each frame a weighted sum of frames up to it and, with look-ahead, of frames after it."""

    def __init__(self, channels: int, lorder: int, rorder: int, lstride: int, rstride: int) -> None:
        super().__init__()
        self.conv_left = filters(channels, lorder, lstride)
        self.conv_right = filters(channels, rorder, rstride) if rorder else None

    def forward(self, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """Filter a chunk.

        Args:
            x: (batch, channels, frames, 1).
            cache: The frames before the chunk, as many as the memory reaches back; None for silence.

        Returns:
            The shape of ``x``, and the cache for the next chunk. Look-ahead sees silence after the chunk.
        """
        past = (self.conv_left.kernel_size[0] - 1) * self.conv_left.dilation[0]
        frames = nn.functional.pad(x, (0, 0, past, 0)) if cache is None else torch.cat([cache, x], dim=2)
        y: Tensor = x + self.conv_left(frames)
        if self.conv_right is not None:
            (order, _), (stride, _) = self.conv_right.kernel_size, self.conv_right.dilation
            y = y + self.conv_right(nn.functional.pad(x, (0, 0, 0, order * stride))[:, :, stride:])
        return y, frames[:, :, x.shape[2] :]


class FSMNLayer(nn.Module):
    """A projection, the memory, and an affine layer with ReLU."""

    def __init__(self, linear_dim: int, proj_dim: int, lorder: int, rorder: int, lstride: int, rstride: int) -> None:
        super().__init__()
        self.linear = LinearLayer(linear_dim, proj_dim, bias=False)
        self.fsmn_block = Memory(proj_dim, lorder, rorder, lstride, rstride)
        self.affine = LinearLayer(proj_dim, linear_dim)

    def forward(self, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """(batch, frames, linear_dim) and the memory's cache -> the same shape, and the next cache."""
        y, cache = self.fsmn_block(self.linear(x).transpose(1, 2).unsqueeze(-1), cache)
        return torch.relu(self.affine(y.squeeze(-1).transpose(1, 2))), cache


class FSMN(nn.Module):
    """Two affine layers, the FSMN layers, and two affine layers before the softmax."""

    def __init__(
        self,
        input_dim: int,
        input_affine_dim: int,
        layers: Sequence[FSMNLayer],
        linear_dim: int,
        output_affine_dim: int,
        output_dim: int,
    ) -> None:
        super().__init__()
        self.in_linear1 = LinearLayer(input_dim, input_affine_dim)
        self.in_linear2 = LinearLayer(input_affine_dim, linear_dim)
        self.fsmn = nn.ModuleList(layers)
        self.out_linear1 = LinearLayer(linear_dim, output_affine_dim)
        self.out_linear2 = LinearLayer(output_affine_dim, output_dim)

    def forward(self, x: Tensor, caches: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(batch, frames, input_dim) and a cache per layer -> posteriors and the next caches."""
        y = torch.relu(self.in_linear2(self.in_linear1(x)))
        following = []
        for layer, cache in zip(self.fsmn, caches, strict=True):
            y, after = layer(y, cache)
            following.append(after)
        return torch.softmax(self.out_linear2(self.out_linear1(y)), dim=-1), tuple(following)


class FSMNVAD(nn.Module):
    """FSMN voice-activity network: class 0 of its posteriors is silence.

    Args:
        input_dim: Features of a low-frame-rate frame: 5 stacked frames of 80 mel bins.
        input_affine_dim: Between the first two layers.
        fsmn_layers: Number of FSMN layers.
        linear_dim: Between the FSMN layers.
        proj_dim: Channels of the memory.
        lorder: Taps of the memory on the frame itself and those before it.
        rorder: Taps on the frames after it; 0 for a network without delay.
        lstride: Frames between the taps before.
        rstride: Frames between the taps after.
        output_affine_dim: Between the last two layers.
        output_dim: Classes.
    """

    def __init__(
        self,
        input_dim: int = 400,
        input_affine_dim: int = 140,
        fsmn_layers: int = 4,
        linear_dim: int = 250,
        proj_dim: int = 128,
        lorder: int = 20,
        rorder: int = 0,
        lstride: int = 1,
        rstride: int = 1,
        output_affine_dim: int = 140,
        output_dim: int = 248,
    ) -> None:
        super().__init__()
        self.looks_ahead = rorder > 0
        layers = [FSMNLayer(linear_dim, proj_dim, lorder, rorder, lstride, rstride) for _ in range(fsmn_layers)]
        self.encoder = FSMN(input_dim, input_affine_dim, layers, linear_dim, output_affine_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Low-frame-rate features (batch, frames, input_dim) -> posteriors (batch, frames, output_dim)."""
        posteriors: Tensor = self.encoder(x, [None] * len(self.encoder.fsmn))[0]
        return posteriors

    def stream(self, x: Tensor, caches: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the posteriors of the next chunk of an utterance.

        Args:
            x: (batch, frames, input_dim), any number of frames.
            caches: What the chunk before gave; None at the start.

        Returns:
            Posteriors (batch, frames, output_dim), and a cache per layer, (batch, proj_dim,
            (lorder - 1) * lstride, 1).

        Raises:
            ModelError: If the network looks ahead.
        """
        if self.looks_ahead:
            raise ModelError("a network with look-ahead (rorder above 0) cannot run chunk by chunk.")
        posteriors, after = self.encoder(x, caches or [None] * len(self.encoder.fsmn))
        return posteriors, after


def infer_arguments(shapes: Mapping[str, Size]) -> dict[str, Any]:
    """Read the arguments of :class:`FSMNVAD` off the shapes of an unpruned state dict.

    Strides leave no trace in the shapes: those of FunASR's VAD are taken.

    Raises:
        KeyError: If a key that tells an argument is not there.
    """
    memory = "encoder.fsmn.0.fsmn_block"
    right = shapes.get(f"{memory}.conv_right.weight")
    return {
        "input_dim": shapes["encoder.in_linear1.linear.weight"][1],
        "input_affine_dim": shapes["encoder.in_linear1.linear.weight"][0],
        "fsmn_layers": sum(key.endswith(".conv_left.weight") for key in shapes),
        "linear_dim": shapes["encoder.in_linear2.linear.weight"][0],
        "proj_dim": shapes["encoder.fsmn.0.linear.linear.weight"][0],
        "lorder": shapes[f"{memory}.conv_left.weight"][2],
        "rorder": right[2] if right else 0,
        "lstride": 1,
        "rstride": 1,
        "output_affine_dim": shapes["encoder.out_linear1.linear.weight"][0],
        "output_dim": shapes["encoder.out_linear2.linear.weight"][0],
    }
