"""How much a channel matters: the L1 norm of everything it owns."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.surgery.graph import ChannelGraph

Scores: TypeAlias = Mapping[str, NDArray[np.float64]]  # group name -> (width,)


@torch.no_grad()
def l1_scores(model: nn.Module, graph: ChannelGraph) -> dict[str, NDArray[np.float64]]:
    """Score each coupled channel by the sum of |w| over all parameter slices it owns.

    Divided by the mean over its group, so that channels of different groups can be ranked together.

    Returns:
        For each prunable group, (width,) scores of mean 1 (all 0 if the group's weights are all zero).

    Source: H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, "Pruning Filters for Efficient ConvNets",
    ICLR 2017; the sum over coupled layers follows G. Fang et al., "DepGraph", CVPR 2023.
    """
    parameters = {name: tensor.detach().double().abs() for name, tensor in model.named_parameters()}
    norms: dict[tuple[str, int], NDArray[np.float64]] = {}
    scores: dict[str, NDArray[np.float64]] = {}
    for group in graph.groups():
        total = np.zeros(group.width)
        for member in group.members:
            if member.name not in parameters:
                continue  # a buffer: running statistics say nothing of importance
            place = (member.name, member.dim)
            if place not in norms:
                norms[place] = slice_norms(parameters[member.name], member.dim)
            total += norms[place][np.array(member.indices)].sum(axis=1)
        mean = total.mean()
        scores[group.name] = total / mean if mean > 0 else total
    return scores


def slice_norms(magnitudes: Tensor, dim: int) -> NDArray[np.float64]:
    """Sum a tensor over every dimension but one."""
    others = [d for d in range(magnitudes.ndim) if d != dim]
    norms: NDArray[np.float64] = (magnitudes.sum(others) if others else magnitudes).cpu().numpy()
    return norms
