"""What narrowing each group alone costs: its channels are masked, and a loss is measured.

The table can be saved and used again, for other targets and ratios of the same network.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.errors import InputError
from compress.files import read_json, write_json
from compress.surgery.graph import ChannelGraph, Removal, Role
from compress.surgery.removal import get_tensor, zero_indices
from compress.surgery.scores import Scores

SCHEMA = 1
FRACTIONS = (0.25, 0.5, 0.75)  # of a group's channels that are masked


@dataclass(frozen=True)
class Sensitivity:
    """How much is lost when a fraction of one group's channels goes.

    Attributes:
        fractions: Of a group's channels, ascending, within (0, 1).
        losses: Group name -> the loss at each fraction; 0 where nothing is removed. A bundle of groups that must stay
            of one width is measured together, under the name of its first group.
    """

    fractions: tuple[float, ...]
    losses: Mapping[str, tuple[float, ...]]

    def losses_at(self, group: str, fractions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Interpolate linearly; the last slope is held up to 1. Losses never fall as more is removed."""
        known = np.array([0.0, *self.fractions])
        measured = np.maximum.accumulate([0.0, *self.losses[group]])
        slope = (measured[-1] - measured[-2]) / (known[-1] - known[-2])
        end = measured[-1] + slope * (1 - known[-1])
        losses: NDArray[np.float64] = np.interp(fractions, [*known, 1.0], [*measured, end])
        return losses


def measure_sensitivity(
    model: nn.Module,
    graph: ChannelGraph,
    scores: Scores,
    loss: Callable[[nn.Module], float],
    bundles: Iterable[Sequence[str]],
    fractions: Sequence[float] = FRACTIONS,
) -> Sensitivity:
    """Measure the loss with the lowest-scored channels of one bundle of groups masked, for each bundle in turn.

    Args:
        model: In eval mode; it is masked in place and restored.
        graph: Its channel groups.
        scores: In a group, the lowest go first.
        loss: Of a network; 0 for the whole one. See ``cosine_loss``.
        bundles: Names of the groups that are narrowed together; most bundles are one group. An iterable that shows
            its progress will do.
        fractions: Of the channels of a group.
    """
    losses: dict[str, tuple[float, ...]] = {}
    for names in bundles:
        measured = []
        for fraction in fractions:
            doomed = {}
            for name in names:
                count = min(round(fraction * len(scores[name])), len(scores[name]) - 1)
                doomed[name] = [int(channel) for channel in np.argsort(scores[name], kind="stable")[:count]]
            with masked(model, graph, doomed):
                measured.append(loss(model))
        losses[names[0]] = tuple(measured)
    return Sensitivity(tuple(fractions), losses)


@contextmanager
def masked(model: nn.Module, graph: ChannelGraph, channels: Removal) -> Iterator[None]:
    """Zero channels in place as ``mask_channels`` does in a copy, and restore them in the end."""
    saved: dict[str, Tensor] = {}
    with torch.no_grad():
        try:
            for group, gone in graph.chosen(channels):
                for member in group.members:
                    if member.name in graph.shapes and (member.role is not Role.CONSUMER or member.leaky):
                        tensor = get_tensor(model, member.name)
                        saved.setdefault(member.name, tensor.clone())
                        zero_indices(model, member.name, member.dim, [i for c in gone for i in member.indices[c]])
            yield
        finally:
            for name, tensor in saved.items():
                get_tensor(model, name).copy_(tensor)


def cosine_loss(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[nn.Module], float]:
    """A loss for ``measure_sensitivity``: one less the mean cosine to the embeddings that the network gives now.

    Args:
        model: The whole network.
        batches: Features (batch, frames, num_mel_bins).
    """

    @torch.no_grad()
    def embeddings(network: nn.Module) -> Tensor:
        return torch.cat([network(batch) for batch in batches])

    reference = embeddings(model)

    def loss(network: nn.Module) -> float:
        return 1 - float(torch.nn.functional.cosine_similarity(reference, embeddings(network)).mean())

    return loss


def write_sensitivity(path: Path, sensitivity: Sensitivity, made_from: Mapping[str, Any]) -> None:
    """Save the table with what it was made from: the network's hash, the score, the loss."""
    table = {"fractions": sensitivity.fractions, "losses": sensitivity.losses}
    write_json(path, {"schema": SCHEMA, "kind": "sensitivity", **made_from, **table})


def read_sensitivity(path: Path, made_from: Mapping[str, Any], groups: Iterable[str]) -> Sensitivity:
    """Read a saved table.

    Args:
        path: A file of ``write_sensitivity``.
        made_from: What it must have been made from.
        groups: The groups that it must tell of.

    Raises:
        InputError: If it is no such table, is damaged, or was made from something else.
    """
    advice = "Name another file, or remove this one to measure anew."
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "sensitivity" or found.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a sensitivity table of this version (schema {SCHEMA}). {advice}")
    for name, wanted in made_from.items():
        if found.get(name) != wanted:
            raise InputError(f"{path} was measured with {name} {found.get(name)!r}, not {wanted!r}. {advice}")
    try:
        fractions = tuple(float(fraction) for fraction in found["fractions"])
        losses = {name: tuple(float(loss) for loss in found["losses"][name]) for name in groups}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}). {advice}") from error
    ascending = all(a < b for a, b in zip((0.0, *fractions), (*fractions, 1.0), strict=True))
    numbers = [loss for measured in losses.values() for loss in measured]
    fits = all(len(measured) == len(fractions) for measured in losses.values())
    if not (fractions and ascending and fits and np.isfinite(numbers).all()):
        raise InputError(f"{path} is damaged: its fractions and losses do not fit. {advice}")
    return Sensitivity(fractions, losses)
