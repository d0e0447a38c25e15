"""Data folders in the style of Kaldi: reading, checking, and making them from public corpora."""

from compress.data.folder import DataFolder, Trials, copies_among, embedded_data, read_scp, write_folder

__all__ = ["DataFolder", "Trials", "copies_among", "embedded_data", "read_scp", "write_folder"]
