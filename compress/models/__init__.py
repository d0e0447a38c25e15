"""Networks known by name, their checkpoints and their embedded weights."""

from compress.models.registry import (
    ARCHITECTURES,
    MIN_FRAMES,
    Architecture,
    architecture,
    load_model,
    load_with_arguments,
)

__all__ = ["ARCHITECTURES", "MIN_FRAMES", "Architecture", "architecture", "load_model", "load_with_arguments"]
