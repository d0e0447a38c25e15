"""Compress speech models: prune, quantize, export, and measure what every step cost and bought."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# A pool of BLAS threads spinning between the small matrix products of the Fbank doubles its CPU time.
# It has to be said before numpy is first imported; whoever set it already keeps their choice.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if TYPE_CHECKING:
    from compress.artifact import Artifact, FrontEnd
    from compress.models import load_model
    from compress.pipeline import RunConfig, run
    from compress.runners import Runner, load

__version__ = "0.1.0"
__all__ = ["Artifact", "FrontEnd", "RunConfig", "Runner", "__version__", "load", "load_model", "run"]

_HOMES = {
    "Artifact": "compress.artifact",
    "FrontEnd": "compress.artifact",
    "RunConfig": "compress.pipeline",
    "Runner": "compress.runners",
    "load": "compress.runners",
    "load_model": "compress.models",
    "run": "compress.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that help and small child processes do not load PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
