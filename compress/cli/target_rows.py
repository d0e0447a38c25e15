"""What an engine's own machine measured, in ``row.json``, taken into the table of the run that made its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import table
from compress.errors import InputError
from compress.files import read_json

ROW = "row.json"
NUMBERS = ("size_bytes", "rtf", "qps", "peak_rss_bytes", "build_s")  # measured on the target
TEXTS = ("runtime", "precision", "device")
LATENCIES = ("latency_ms", "e2e_latency_ms")
KINDS = ("mean", "p50", "p95", "p99")


@dataclass(frozen=True)
class Table:
    """The table of a run, and where it was read from."""

    path: Path
    content: Mapping[str, Any]

    def step_folder(self, row: Mapping[str, Any]) -> Path:
        """The folder of the step that a row is of."""
        return self.path.parent / str(row["artifact"]["folder"])


def read_tables(paths: Sequence[Path]) -> tuple[list[Table], list[Path]]:
    """Read the tables of runs; what is a row of a target is left as a path.

    Raises:
        InputError: If something is neither.
    """
    tables, rows = [], []
    for given in paths:
        path = given / "table.json" if given.is_dir() else given
        found = read_json(path)
        if isinstance(found, dict) and "graph_sha256" in found:
            rows.append(path)
        elif isinstance(found, dict) and found.get("schema") == table.SCHEMA and "rows" in found:
            tables.append(Table(path, found))
        else:
            raise InputError(f"{path} is not the table of a run of this version (schema {table.SCHEMA}).")
    return tables, rows


def with_target_rows(tables: Sequence[Table], given: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """Rows of each table; deferred ones are replaced by what their targets measured, one row for each target.

    Args:
        tables: Of runs. A ``row.json`` that lies in the folder of a step is found there.
        given: Further ones, from wherever they lie.

    Raises:
        InputError: If one is damaged, or of another graph than any deferred step here.
    """
    unused = list(dict.fromkeys(given))
    merged = []
    for source in tables:
        rows: list[dict[str, Any]] = []
        for row in source.content["rows"]:
            if row["status"] != "deferred":
                rows.append(dict(row))
                continue
            graphs = graphs_of(source.step_folder(row))
            own = source.step_folder(row) / ROW
            if own.is_file() and read_row(own)["graph_sha256"] not in graphs:
                raise another_graph(own, [source.step_folder(row)])
            found = [path for path in given if read_row(path)["graph_sha256"] in graphs]
            unused = [path for path in unused if path not in found]
            paths = {path.resolve(): path for path in ([own] if own.is_file() else []) + found}
            rows += [filled(row, read_row(path)) for path in paths.values()] or [dict(row)]
        merged.append(rows)
    if unused:
        deferred = [t.step_folder(row) for t in tables for row in t.content["rows"] if row["status"] == "deferred"]
        raise another_graph(unused[0], deferred)
    return merged


def another_graph(path: Path, folders: Sequence[Path]) -> InputError:
    """The error for a row that belongs to no step."""
    steps = ", ".join(map(str, folders)) or "none: no step of the runs given is deferred"
    return InputError(
        f"{path} was measured on another graph (SHA-256 {read_row(path)['graph_sha256'][:12]}...) than that of the"
        f" step: {steps}. Give the run whose folder was copied to the target, or build the engine anew from this one."
    )


def graphs_of(folder: Path) -> set[str]:
    """SHA-256 of the graphs in a step's folder, as its record has them; empty if the folder is gone."""
    record = folder / "artifact.json"
    if not record.is_file():
        return set()
    files = read_json(record).get("files", {})
    return {about["sha256"] for name, about in files.items() if name.endswith(".onnx")}


def read_row(path: Path) -> dict[str, Any]:
    """Read and check what a target measured.

    Raises:
        InputError: If it is damaged.
    """
    found = read_json(path)
    if not (isinstance(found, dict) and is_row(found)):
        raise InputError(
            f"{path} is not a row that build_engine.py wrote, or is damaged. Run build_engine.py on the target again."
        )
    return found


def is_row(found: Mapping[str, Any]) -> bool:
    """Whether every figure is of the kind that the table takes."""
    notes, latencies = found.get("notes") or [], [found.get(name) for name in LATENCIES]
    return (
        found.get("status") == "ok"
        and all(isinstance(found.get(name), str) for name in (*TEXTS, "graph_sha256"))
        and all(isinstance(found.get(name), int | float | None) for name in NUMBERS)
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
        and all(
            latency is None
            or (isinstance(latency, dict) and all(isinstance(latency.get(kind), int | float) for kind in KINDS))
            for latency in latencies
        )
    )


def filled(deferred: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """A deferred row with what its target measured; what was not measured there stays None."""
    figures = {name: measured.get(name) for name in (*NUMBERS, *TEXTS)}
    latencies = {name: {k: measured[name][k] for k in KINDS} if measured.get(name) else None for name in LATENCIES}
    artifact = {**deferred["artifact"], "sha256": measured.get("sha256", deferred["artifact"]["sha256"])}
    notes = [*(deferred["notes"] or ()), *(measured.get("notes") or ())]
    return table.row(
        **{
            **deferred,
            **figures,
            **latencies,
            "status": "ok",
            "reason": None,
            "command": None,
            "notes": notes,
            "artifact": artifact,
        }
    )
