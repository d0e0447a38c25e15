"""Parameters and multiply-accumulates, before and after a removal."""

import copy
import warnings
from contextlib import nullcontext
from math import prod

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compress.surgery.graph import ChannelGraph, ChannelGroup, Removal
from compress.surgery.labels import IntArray


def count_parameters(model: nn.Module) -> int:
    """Count the weights; shared ones once, buffers such as batch-norm statistics not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_after(graph: ChannelGraph, channels: Removal) -> int:
    """Predict ``count_parameters`` of the network without these channels, from shapes alone."""
    gone = graph.removed_indices(channels)
    return sum(
        prod(size - len(gone.get((name, dim), ())) for dim, size in enumerate(graph.shapes[name]))
        for name in graph.parameters
    )


class ParameterCounter:
    """Count parameters from the number of channels removed per group, many times over.

    Channels of one group own the same number of indices everywhere, so their number is all that matters.
    """

    def __init__(self, graph: ChannelGraph, groups: tuple[ChannelGroup, ...]) -> None:
        places = [(name, dim) for name in graph.parameters for dim in range(len(graph.shapes[name]))]
        row = {place: i for i, place in enumerate(places)}
        self._sizes: IntArray = np.array([graph.shapes[name][dim] for name, dim in places], dtype=np.int64)
        self._owned: IntArray = np.zeros((len(places), len(groups)), dtype=np.int64)
        for column, group in enumerate(groups):
            for member in group.members:
                if (member.name, member.dim) in row:
                    self._owned[row[member.name, member.dim], column] += len(member.indices[0])
        self._starts: IntArray = np.array([i for i, (_, dim) in enumerate(places) if dim == 0], dtype=np.int64)
        self._scalars = sum(1 for name in graph.parameters if not graph.shapes[name])

    def count(self, removed: IntArray) -> int:
        """Parameters left when ``removed[i]`` channels of group i are gone."""
        if not len(self._sizes):
            return self._scalars
        left = self._sizes - self._owned @ removed
        sizes: IntArray = np.multiply.reduceat(left, self._starts)
        return int(sizes.sum()) + self._scalars


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-accumulates of convolutions and matrix products for one input, in eval mode."""
    model = copy.deepcopy(model).eval()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    # Without oneDNN a recurrent layer runs as the matrix products that the counter knows.
    plain = torch.backends.mkldnn.flags(enabled=False) if recurrent else nullcontext()
    with warnings.catch_warnings(), torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")  # leaving the oneDNN flags warns about Intel GPUs
        model(example)
    return int(counter.get_total_flops()) // 2
