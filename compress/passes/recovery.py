"""Recovery without labels: a pruned network is brought nearer to the dense one on unlabeled audio."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from compress.passes.base import Array
from compress.surgery import ChannelGraph
from compress.surgery.graph import Removal

VARIANCE_FLOOR = 0.5  # of the variance before pruning
RIDGE = 1e-3  # of the mean power of a layer's inputs

Weighted: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.RNNBase


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
def reconstruct_consumers(
    dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, channels: Removal, utterances: list[Array]
) -> list[str]:
    """Fit the weights that read pruned channels to what the dense network computes there, in place.

    Front to back, each layer that lost inputs gets the weights W that minimise ``|W x + b - y|^2`` over unlabeled
    utterances, plus a small ridge around its present weights: x is what the layer reads in the pruned network so
    far, y what the dense layer gives. A closed form per layer; for networks without batch norm to re-estimate.
    Recurrent layers are fitted where they read their input; their own recurrence is left alone.

    Source: Y. He, X. Zhang, J. Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017.

    Args:
        dense: The network before pruning.
        pruned: Without ``channels``; in eval mode.
        graph: Traced from ``dense``.
        channels: What was removed.
        utterances: Features (frames, num_mel_bins).

    Returns:
        The weights that were fitted.
    """
    gone = graph.removed_indices(channels)
    fitted = []
    for name in consumers_in_order(dense, pruned, graph, channels, utterances[0]):
        path, _, leaf = name.rpartition(".")
        before, after = dense.get_submodule(path), pruned.get_submodule(path)
        assert isinstance(before, Weighted)
        assert isinstance(after, Weighted)
        doomed = set(gone.get((name, 0), ()))
        rows = torch.tensor([i for i in range(graph.shapes[name][0]) if i not in doomed])
        weight = after.get_parameter(leaf)
        present = weight.flatten(1).double()
        old = before.get_parameter(leaf).flatten(1).double()
        power = torch.zeros(present.shape[1], present.shape[1], dtype=torch.float64)
        product = torch.zeros_like(present)
        for utterance in utterances:
            features = torch.from_numpy(utterance[None])
            wanted = inputs_of(dense, before, features) @ old[rows].T  # (positions, rows)
            read = inputs_of(pruned, after, features)  # (positions, columns)
            power += read.T @ read
            product += wanted.T @ read
        ridge = RIDGE * power.diagonal().mean()
        power.diagonal().add_(ridge)
        solution = torch.linalg.solve(power, (product + ridge * present).T).T
        if torch.isfinite(solution).all():
            weight.copy_(solution.reshape(weight.shape))
            fitted.append(name)
    return fitted


def consumers_in_order(
    dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, channels: Removal, utterance: Array
) -> list[str]:
    """The weights that lost columns and can be fitted, in the order in which the network uses them."""
    lost = {name for (name, dim), indices in graph.removed_indices(channels).items() if dim == 1 and indices}
    free = {
        path: module
        for path, module in dense.named_modules()
        if isinstance(module, nn.Linear | nn.RNNBase)
        or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros")
    }
    order: list[str] = []
    with hooked(free.values(), lambda module, _: order.append(next(p for p, m in free.items() if m is module))):
        dense(torch.from_numpy(utterance[None]))
    names = [
        f"{path}.{leaf}" for path in dict.fromkeys(order) for leaf in ("weight", "weight_ih_l0", "weight_ih_l0_reverse")
    ]
    return [name for name in names if name in lost and name not in graph.aliases]


def inputs_of(model: nn.Module, layer: Weighted, features: Tensor) -> Tensor:
    """What the columns of a layer's weight are multiplied with, (positions, columns) in float64."""
    seen: list[Tensor] = []
    with hooked([layer], lambda _, given: seen.append(given)):
        model(features)
    if isinstance(layer, nn.Linear | nn.RNNBase):
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
    padding = layer._reversed_padding_repeated_twice  # what the layer itself pads with, "same" resolved
    images = [nn.functional.pad(x if x.ndim == 4 else x.unsqueeze(2), padding) for x in seen]
    kernel, dilation, stride = ((1, *size)[-2:] for size in (layer.kernel_size, layer.dilation, layer.stride))
    columns = [nn.functional.unfold(image, kernel, dilation, 0, stride) for image in images]
    return torch.cat([column.transpose(1, 2).flatten(0, 1) for column in columns]).double()


@contextmanager
def hooked(layers: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with a layer and its input whenever one of these runs."""
    handles = [layer.register_forward_pre_hook(lambda module, given: see(module, given[0])) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_cosine(reference: nn.Module, model: nn.Module, utterances: list[Array]) -> float:
    """Mean cosine between the two networks' embeddings, or frames' outputs, of utterances (frames, num_mel_bins)."""
    inputs = [torch.from_numpy(utterance[None]) for utterance in utterances]
    cosines = [nn.functional.cosine_similarity(reference(x), model(x), dim=-1).mean() for x in inputs]
    return float(torch.stack(cosines).mean())
