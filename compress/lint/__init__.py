"""What TensorRT's ONNX parser demands of a graph, checked without TensorRT.

The rules come from the parser's sources and its tables of operators (onnx/onnx-tensorrt, 8.5 to 10.15). A graph without
findings may still fail to build: which kernels there are for its shapes is known on the target alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.lint import operators, quantization, tensors, whole
from compress.lint.graph import (
    DEFAULT_VERSION,
    Finding,
    Graph,
    Profile,
    Severity,
    Shapes,
    Version,
    read_version,
)

if TYPE_CHECKING:
    import onnx

__all__ = [
    "DEFAULT_VERSION",
    "RULES",
    "Finding",
    "Profile",
    "Severity",
    "Shapes",
    "Version",
    "errors",
    "lint",
    "read_version",
]

RULES = (*whole.RULES, *operators.RULES, *tensors.RULES, *quantization.RULES)


def lint(model: "onnx.ModelProto", profile: Profile | None = None, version: Version = DEFAULT_VERSION) -> list[Finding]:
    """Find what TensorRT would refuse, misread or run slowly.

    Args:
        model: A float or Q/DQ graph. External data need not be loaded; what is not loaded is a finding.
        profile: Sizes of its inputs by name; None where there are none.
        version: Major and minor version of the TensorRT that is to read it.

    Returns:
        Findings by rule, in the order of the graph; errors before warnings.
    """
    graph = Graph(model, profile or {}, version)
    found = [finding for rule in RULES for finding in rule(graph)]
    return sorted(found, key=lambda finding: finding.severity)


def errors(findings: Sequence[Finding]) -> list[Finding]:
    """Leave out the warnings."""
    return [finding for finding in findings if finding.severity == "error"]
