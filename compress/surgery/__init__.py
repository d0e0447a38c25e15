"""Exact structured removal of channels, for any network that torch.export can trace.

Trace the network, score its coupled channels, choose, remove, and verify:

    graph = trace(model, features)
    selection = choose_channels(graph, l1_scores(model, graph), ratio=0.4)
    pruned = remove_channels(model, graph, selection.channels)
    report = verify_removal(model, pruned, graph, selection.channels, features)
"""

from compress.surgery.adapters import Requested, channels_of_lists, channels_of_masks, read_request
from compress.surgery.counting import (
    ByteCounter,
    Counter,
    MacsCounter,
    ParameterCounter,
    count_macs,
    count_parameters,
    parameters_after,
)
from compress.surgery.gate import GateReport, verify_removal
from compress.surgery.graph import ChannelGraph, ChannelGroup, Member, Removal, Role, trace
from compress.surgery.removal import mask_channels, mask_consumers, remove_channels, widths_stored_in
from compress.surgery.resize import resize_to
from compress.surgery.scores import (
    Normalise,
    activation_scores,
    bn_scale_scores,
    l1_scores,
    l2_scores,
    taylor_scores,
)
from compress.surgery.selection import Scope, Selection, choose_channels
from compress.surgery.sensitivity import Sensitivity, cosine_loss, measure_sensitivity
from compress.surgery.widths import kept_groups

__all__ = [
    "ByteCounter",
    "ChannelGraph",
    "ChannelGroup",
    "Counter",
    "GateReport",
    "MacsCounter",
    "Member",
    "Normalise",
    "ParameterCounter",
    "Removal",
    "Requested",
    "Role",
    "Scope",
    "Selection",
    "Sensitivity",
    "activation_scores",
    "bn_scale_scores",
    "channels_of_lists",
    "channels_of_masks",
    "choose_channels",
    "cosine_loss",
    "count_macs",
    "count_parameters",
    "kept_groups",
    "l1_scores",
    "l2_scores",
    "mask_channels",
    "mask_consumers",
    "measure_sensitivity",
    "parameters_after",
    "read_request",
    "remove_channels",
    "resize_to",
    "taylor_scores",
    "trace",
    "verify_removal",
    "widths_stored_in",
]
