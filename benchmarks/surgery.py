"""Trace and prune every registered network beside Torch-Pruning; writes its section of docs/results.md.

    pip install torch-pruning==1.6.1
    python benchmarks/surgery.py [--networks campplus,tdnn_blstm]

Networks of full size with random weights and random batch-norm statistics, so that a wrong column shows. Ours loses
40 % of its parameters, the same share of every group; Torch-Pruning is given the channel ratio 0.4, its own unit. Both
are judged alike: the channels that went are zeroed where they are made, in a copy of the whole network, and its
embedding is compared with the pruned network's, relative to the largest value. Seconds are wall time.
"""

import copy
import importlib.metadata
import sys
import time
import warnings
from dataclasses import dataclass

import click
import torch
from results import write_section
from torch import Tensor, nn

from compress import machine
from compress.artifact import versions
from compress.models.registry import ARCHITECTURES
from compress.surgery import (
    ChannelGraph,
    Role,
    channels_of_lists,
    choose_channels,
    count_parameters,
    l1_scores,
    mask_channels,
    remove_channels,
    trace,
    verify_removal,
)
from compress.surgery.widths import layer_of

FRAMES = 120
EXACT = 1e-4  # relative, in float32; a wrong column shows as a tenth and more


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        seconds: For tracing and pruning.
        removed: Fraction of the parameters.
        verdict: "exact", "wrong" or how it failed, with the figure.
    """

    seconds: float
    removed: float | None
    verdict: str

    @property
    def cells(self) -> list[str]:
        """Of the table."""
        return [f"{self.seconds:.1f} s", "–" if self.removed is None else f"{self.removed:.1%}", self.verdict]


@click.command()
@click.option("--networks", default=",".join(ARCHITECTURES), show_default=True)
def main(networks: str) -> None:
    """Prune every network with both, and write the table."""
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        sys.exit("this comparison needs Torch-Pruning: pip install torch-pruning==1.6.1")
    warnings.simplefilter("ignore")
    titles = ["network", "parameters", "ours", "removed", "check in float64", "Torch-Pruning", "removed", "result"]
    lines = ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]
    for name in networks.split(","):
        model, features = network(name)
        graph, ours = prune_ours(model, features)
        theirs = prune_theirs(model, features, graph)
        cells = [f"`{name}`", f"{count_parameters(model) / 1e6:.2f} M", *ours.cells, *theirs.cells]
        lines.append("| " + " | ".join(cells) + " |")
        click.echo(lines[-1])
    tested = ", ".join(f"{package} {number}" for package, number in versions().items())
    about = (
        f"{machine.describe()['cpu']}, {torch.get_num_threads()} threads; {tested},"
        f" torch-pruning {importlib.metadata.version('torch-pruning')}."
    )
    text = "\n".join(["## Channel surgery beside Torch-Pruning\n", *lines, "", about])
    write_section("surgery", text)


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode with random statistics, and features for it."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return model.eval(), torch.randn(1, FRAMES, 400 if name == "fsmn_vad" else 80)


def prune_ours(model: nn.Module, features: Tensor) -> tuple[ChannelGraph, Outcome]:
    """Trace, choose, remove; then the check, whose time is told apart."""
    start = time.perf_counter()
    graph = trace(model, features)
    channels = choose_channels(graph, l1_scores(model, graph), 0.4).channels
    pruned = remove_channels(model, graph, channels)
    seconds = time.perf_counter() - start
    gate = verify_removal(model, pruned, graph, channels, features)
    verdict = f"exact, {gate.max_relative_error:.0e} in {gate.seconds:.1f} s"
    return graph, Outcome(seconds, 1 - count_parameters(pruned) / count_parameters(model), verdict)


def prune_theirs(dense: nn.Module, features: Tensor, graph: ChannelGraph) -> Outcome:
    """Let Torch-Pruning trace and prune a copy, and compare it with the network masked by our labels."""
    import torch_pruning as tp

    model = copy.deepcopy(dense).requires_grad_(True)  # it traces with gradients
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    outputs = {layer_of(m.name) for g in graph.all_groups if g.frozen for m in g.members if m.role is Role.PRODUCER}
    gone: dict[str, list[int]] = {}
    start = time.perf_counter()
    try:
        pruner = tp.pruner.MagnitudePruner(
            model,
            features,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.4,
            ignored_layers=[modules[name] for name in outputs if isinstance(modules.get(name), nn.Module)],
        )
        for group in pruner.step(interactive=True):
            for dependency, indices in group:
                layer = dependency.target.module
                weighted = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))
                if weighted and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                    gone.setdefault(names[layer], []).extend(int(index) for index in indices)
            group.prune()
        seconds = time.perf_counter() - start
        removed = 1 - count_parameters(model) / count_parameters(dense)
        with torch.inference_mode():
            found = model(features)
            masked = mask_channels(dense, graph, channels_of_lists(graph, gone).channels)
            expected = masked(features)
    except Exception as error:  # whatever it or the network that it left raises is the result
        seconds = time.perf_counter() - start
        return Outcome(seconds, None, f"{type(error).__name__}: {str(error).splitlines()[0][:70]}")
    difference = float((found - expected).abs().max() / expected.abs().max())
    return Outcome(seconds, removed, f"{'exact' if difference < EXACT else 'WRONG'}, {difference:.0e}")


if __name__ == "__main__":
    main()
