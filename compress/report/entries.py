"""The table's rows as the report uses them: each with a label of its own and its variant's colour."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Metric(NamedTuple):
    """What is measured as error rate: its field in a row and its name."""

    field: str
    name: str


METRICS = (Metric("eer", "EER"), Metric("wer", "WER"), Metric("frame_error", "frame error"))


@dataclass(frozen=True)
class Entry:
    """One row, its unique label, and the number of its variant, which decides colour and marker."""

    row: Row
    label: str
    series: int

    @property
    def is_ok(self) -> bool:
        """Whether the step was carried out here."""
        return bool(self.row["status"] == "ok")

    @property
    def size_bytes(self) -> float | None:
        """Bytes of the deployable files."""
        return finite(self.row["size_bytes"])

    @property
    def latency_ms(self) -> float | None:
        """Median model latency."""
        return finite((self.row["latency_ms"] or {}).get("p50"))

    def error(self, metric: Metric) -> float | None:
        """Error rate as a fraction."""
        return finite(self.row.get(metric.field))

    def interval(self, metric: Metric) -> tuple[float, float] | None:
        """95 % interval of the error rate, as fractions."""
        low, high = map(finite, self.row.get(f"{metric.field}_ci95") or (None, None))
        return None if low is None or high is None else (low, high)

    def rise_interval(self, metric: Metric) -> tuple[float, float] | None:
        """Paired 95 % interval of this row's error rate minus the baseline's; None where not measured."""
        low, high = map(finite, self.row.get(f"{metric.field}_rise_ci95") or (None, None))
        return None if low is None or high is None else (low, high)


def entries_of(rows: Sequence[Row]) -> list[Entry]:
    """Number the variants in order and name the runtime where one variant has several rows."""
    order = {name: index for index, name in enumerate(dict.fromkeys(row["variant"] for row in rows))}
    count = Counter(row["variant"] for row in rows)
    labels = [
        row["variant"] if count[row["variant"]] == 1 else f"{row['variant']} ({row['runtime'] or row['format']})"
        for row in rows
    ]
    return [Entry(row, label, order[row["variant"]]) for row, label in zip(rows, labels, strict=True)]


def baseline_of(entries: Sequence[Entry]) -> Entry | None:
    """Find the row that the others are compared with: the one named baseline, or else the first."""
    return next((entry for entry in entries if entry.row["variant"] == "baseline"), entries[0] if entries else None)


def metric_of(rows: Sequence[Row]) -> Metric:
    """Find the error rate that these rows carry; EER if none was measured."""
    return next((metric for metric in METRICS if any(row.get(metric.field) is not None for row in rows)), METRICS[0])


def finite(value: Any) -> float | None:
    """Give a figure as float, and None for one that is missing or not a finite number."""
    return float(value) if value is not None and math.isfinite(value) else None
