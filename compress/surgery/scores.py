"""How much a channel matters: by its weights, its batch norm, its activations or the gradient of a loss.

Every score is a number per channel of a group, divided by the mean over the group (or its maximum, or by nothing), so
that channels of different groups can be ranked together.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.errors import InputError
from compress.surgery.graph import ChannelGraph, ChannelGroup, Role

Scores: TypeAlias = Mapping[str, NDArray[np.float64]]  # group name -> (width,)
Vectors: TypeAlias = dict[str, NDArray[np.float64]]
Normalise: TypeAlias = Literal["mean", "max", "none"]

COSINE_SCALE = 32.0  # of the softmax over speakers, as in training with AAM-softmax


def l1_scores(model: nn.Module, graph: ChannelGraph, normalise: Normalise = "mean") -> Vectors:
    """Score each coupled channel by the sum of |w| over all parameter slices it owns.

    Returns:
        For each prunable group, (width,) scores of mean 1 (all 0 if the group's weights are all zero).

    Source: H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, "Pruning Filters for Efficient ConvNets",
    ICLR 2017; the sum over coupled layers follows G. Fang et al., "DepGraph", CVPR 2023.
    """
    magnitudes = {name: tensor.detach().double().abs() for name, tensor in model.named_parameters()}
    return normalised(sums_over_slices(graph, magnitudes), normalise)


def l2_scores(model: nn.Module, graph: ChannelGraph, normalise: Normalise = "mean") -> Vectors:
    """Score each coupled channel by the root of the sum of w^2 over all parameter slices it owns."""
    squares = {name: tensor.detach().double().square() for name, tensor in model.named_parameters()}
    return normalised({name: np.sqrt(sums) for name, sums in sums_over_slices(graph, squares).items()}, normalise)


def bn_scale_scores(model: nn.Module, graph: ChannelGraph, normalise: Normalise = "mean") -> Vectors:
    """Score each coupled channel by |scale| of its batch norms, summed; groups without one are left out.

    Source: Z. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017. It is
    meant for networks that were trained with a penalty on the scales.
    """
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
    scales = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().double().abs() for name in norms}
    return normalised(sums_over_slices(graph, scales, partial=True), normalise)


@torch.no_grad()
def activation_scores(
    model: nn.Module, graph: ChannelGraph, batches: Iterable[Tensor], normalise: Normalise = "mean"
) -> Vectors:
    """Score each coupled channel by the mean |output| of the layers that make it, summed over these layers.

    The output is taken as the convolution, linear or recurrent layer gives it, before batch norm. Groups that no such
    layer makes (the inner layers of an LSTM, bare parameters) are left out.

    Args:
        model: In eval mode.
        graph: Its channel groups.
        batches: Unlabeled features (batch, frames, num_mel_bins).
        normalise: By what to divide in a group.
    """
    outputs = {layer: MeanMagnitude() for group in graph.groups() for _, layer, _ in made_by(model, group)}
    with ExitStack() as hooks:
        for layer, mean in outputs.items():
            hooks.callback(model.get_submodule(layer).register_forward_hook(mean.observe).remove)
        for batch in batches:
            model(batch)
    scores = {}
    for group in graph.groups():
        parts = [outputs[layer].value()[columns].sum(axis=1) for _, layer, columns in made_by(model, group)]
        if parts:
            scores[group.name] = np.sum(parts, axis=0)
    return normalised(scores, normalise)


class MeanMagnitude:
    """The mean |output| of each channel of a layer, over everything that it is run on."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def observe(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Take in an output: channels on axis 1 of a convolution's, on the last of other layers'."""
        tensor = output if isinstance(output, Tensor) else output[0]
        axis = -module.weight.ndim + 1 if isinstance(module, CONVOLUTIONS) else -1
        rows = tensor.detach().abs().movedim(axis, 0).flatten(1)
        total = rows.sum(dim=1, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += rows.shape[1]

    def value(self) -> NDArray[np.float64]:
        """(channels,)."""
        assert self._sum is not None, "every layer that makes channels is run by the traced forward pass"
        mean: NDArray[np.float64] = (self._sum / self._count).cpu().numpy()
        return mean


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def made_by(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    """The weights whose layers put out the group's channels: tensor, layer, and (width, n) channels of the output."""
    for member in group.members:
        layer, _, leaf = member.name.rpartition(".")
        module = model.get_submodule(layer)
        if member.role is not Role.PRODUCER or member.dim != 0:
            continue
        indices = np.array(member.indices)
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            yield member.name, layer, indices
        elif isinstance(module, nn.RNNBase):
            last = f"_l{module.num_layers - 1}"
            made = f"weight_hr{last}" if module.proj_size else f"weight_ih{last}"
            if leaf.removesuffix("_reverse") == made:
                width = module.proj_size or module.hidden_size  # the first gate's rows are the units
                yield member.name, layer, indices[:, :1] + width * leaf.endswith("_reverse")


def taylor_scores(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence[tuple[Tensor, Tensor]],
    normalise: Normalise = "mean",
) -> Vectors:
    """Score each coupled channel by the sum of |gradient x weight| over all parameter slices it owns.

    The loss is the cross-entropy of telling speakers apart: a softmax over the cosines to the speakers' centroids,
    which are the means of the network's own embeddings. So no classifier of the training is needed.

    Args:
        model: In eval mode; it is left as it is.
        graph: Its channel groups.
        batches: Features (batch, frames, num_mel_bins) and speakers (batch,), numbered from 0.
        normalise: By what to divide in a group.

    Raises:
        InputError: If there are fewer than two speakers.

    Source: P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    speakers = torch.cat([labels for _, labels in batches])
    if len(set(speakers.tolist())) < 2:
        raise InputError("score taylor tells speakers apart; the utterances given are of fewer than two.")
    with torch.no_grad():
        embeddings = nn.functional.normalize(torch.cat([model(features) for features, _ in batches]))
        centroids = torch.zeros(int(speakers.max()) + 1, embeddings.shape[1]).index_add_(0, speakers, embeddings)
        centroids = nn.functional.normalize(centroids)
    importance: defaultdict[str, Tensor | float] = defaultdict(float)
    for features, labels in batches:
        model.zero_grad()
        cosines = nn.functional.normalize(model(features)) @ centroids.T
        nn.functional.cross_entropy(COSINE_SCALE * cosines, labels).backward()  # type: ignore[no-untyped-call]
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                importance[name] += (weight.grad.double() * weight.detach().double()).abs() * len(labels)
    found = {name: tensor for name, tensor in importance.items() if isinstance(tensor, Tensor)}
    return normalised(sums_over_slices(graph, found), normalise)


def sums_over_slices(graph: ChannelGraph, elements: Mapping[str, Tensor], partial: bool = False) -> Vectors:
    """For each channel of each prunable group, the sum over the slices of these tensors that it owns.

    Groups that own nothing of them are left out if ``partial``, and have sums of zero if not.
    """
    along: dict[tuple[str, int], NDArray[np.float64]] = {}
    sums: Vectors = {}
    for group in graph.groups():
        carriers = [member for member in group.members if member.name in elements]
        if partial and not carriers:
            continue
        total = np.zeros(group.width)
        for member in carriers:
            place = (member.name, member.dim)
            if place not in along:
                along[place] = sums_along(elements[member.name], member.dim)
            total += along[place][np.array(member.indices)].sum(axis=1)
        sums[group.name] = total
    return sums


def sums_along(tensor: Tensor, dim: int) -> NDArray[np.float64]:
    """Sum a tensor over every dimension but one."""
    others = [d for d in range(tensor.ndim) if d != dim]
    sums: NDArray[np.float64] = (tensor.sum(others) if others else tensor).cpu().numpy()
    return sums


def normalised(scores: Vectors, normalise: Normalise) -> Vectors:
    """Divide the scores of each group by their mean or maximum; those of a group that is all zero stay."""
    if normalise == "none":
        return scores
    by = {name: score.mean() if normalise == "mean" else score.max() for name, score in scores.items()}
    return {name: score / by[name] if by[name] > 0 else score for name, score in scores.items()}
