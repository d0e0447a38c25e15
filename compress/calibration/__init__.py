"""What values the tensors of a network take on audio, and the range that 8 bits should cover."""

from compress.calibration.choice import choose_utterances, level_db
from compress.calibration.collect import Method, Range, Ranges, collect_ranges, maker_of

__all__ = ["Method", "Range", "Ranges", "choose_utterances", "collect_ranges", "level_db", "maker_of"]
