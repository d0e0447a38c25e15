"""Recovery without labels: a pruned network is brought nearer to the dense one on unlabeled audio."""

import numpy as np
import torch
from torch import Tensor, nn

from compress.passes.base import Array

VARIANCE_FLOOR = 0.5  # of the variance before pruning


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """List the batch-norm layers that keep running statistics."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, utterances: list[Array]) -> None:
    """Replace the running statistics of every batch norm by those of unlabeled utterances, in place.

    Only batch norm is put in training mode; a cumulative average over batches of similar length is taken. Shorter
    utterances of a batch are repeated to the longest, so neither padding nor lost frames distort the statistics.

    No variance falls below ``VARIANCE_FLOOR`` of its old value: a channel that lost most of its input would
    otherwise be amplified, and over many layers one rare sound then grows a thousandfold, which INT8 cannot hold.

    Args:
        model: In eval mode before and after.
        utterances: Features (frames, num_mel_bins), at least two.
    """
    layers = batch_norms(model)
    momenta = [layer.momentum for layer in layers]
    floors = [VARIANCE_FLOOR * running_var(layer) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        for batch in batches_by_length(utterances, size=16):
            model(batch)
    finally:
        for layer, momentum, floor in zip(layers, momenta, floors, strict=True):
            running_var(layer).clamp_(min=floor)
            layer.momentum = momentum
            layer.eval()


def running_var(layer: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Running variance (channels,) of a batch norm that keeps statistics."""
    assert layer.running_var is not None, "batch_norms lists only layers that keep statistics"
    return layer.running_var


def batches_by_length(utterances: list[Array], size: int) -> list[Tensor]:
    """Sort by length and repeat each group of about ``size`` to its longest: (batch, frames, num_mel_bins) each."""
    ordered = sorted(utterances, key=len)
    groups = np.array_split(np.arange(len(ordered)), max(1, len(ordered) // size))
    return [
        torch.from_numpy(np.stack([_repeated(ordered[i], len(ordered[group[-1]])) for i in group])) for group in groups
    ]


def _repeated(utterance: Array, frames: int) -> Array:
    return np.resize(utterance, (frames, utterance.shape[1]))


@torch.no_grad()
def mean_cosine(reference: nn.Module, model: nn.Module, utterances: list[Array]) -> float:
    """Mean cosine between the two networks' embeddings of the same utterances (frames, num_mel_bins)."""
    inputs = [torch.from_numpy(utterance[None]) for utterance in utterances]
    cosines = [torch.nn.functional.cosine_similarity(reference(x), model(x)) for x in inputs]
    return float(torch.cat(cosines).mean())
