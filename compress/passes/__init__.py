"""The compression passes by name; further ones come from the entry-point group ``compress.passes``."""

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points

from compress.errors import SettingError, unknown_name
from compress.passes.base import Cell, Context, Pass, Preview, build
from compress.passes.distill import Distill
from compress.passes.finetune import Finetune
from compress.passes.onnx_export import Onnx
from compress.passes.openvino import OpenVINO
from compress.passes.optimize import Optimize
from compress.passes.prune import Prune
from compress.passes.ptq import PTQ
from compress.passes.trt import TRT

OWN: tuple[type[Pass], ...] = (Prune, Distill, Finetune, Onnx, Optimize, PTQ, TRT, OpenVINO)

__all__ = [
    "PTQ",
    "TRT",
    "Cell",
    "Context",
    "Distill",
    "Finetune",
    "Onnx",
    "OpenVINO",
    "Optimize",
    "Pass",
    "Preview",
    "Prune",
    "build",
    "pass_named",
    "passes",
]


@lru_cache
def passes() -> Mapping[str, type[Pass]]:
    """All passes by name.

    Raises:
        SettingError: If an installed entry point is not a pass, or takes a name that is in use.
    """
    found = {kind.name: kind for kind in OWN}
    for point in entry_points(group="compress.passes"):
        kind = point.load()
        if not (isinstance(kind, type) and issubclass(kind, Pass)):
            raise SettingError(f"entry point {point.value} of compress.passes is not a Pass.")
        if found.setdefault(kind.name, kind) is not kind:
            raise SettingError(f"entry point {point.value} takes the name of the pass '{kind.name}'.")
    return found


def pass_named(name: str) -> type[Pass]:
    """Look up a pass by name.

    Raises:
        SettingError: If there is none; the nearest name is offered.
    """
    if name not in passes():
        raise unknown_name("pass", name, passes())
    return passes()[name]
