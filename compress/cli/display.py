"""What the command line shows: progress bars on standard error, tables on standard output."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from compress import table
from compress.artifact import Artifact
from compress.passes import Cell
from compress.progress import length

T = TypeVar("T")

NUMBERS = ("params", "size", "flips", "latency p50", "speed-up")  # columns set to the right
WIDEST = 10_000  # characters of a printed line
MOST_NAMES = 3  # in one cell of a table


def columns() -> tuple[ProgressColumn, ...]:
    """What a bar shows: what is done, how much of it, and the time left."""
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()


class Bars:
    """Progress on standard error: a line for each thing begun, a bar with the time left for long work.

    Args:
        quiet: Shows nothing, as of several processes all but the first do.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Show a bar while items are worked on; where standard error is no terminal, a line at the end."""
        count = length(items, total)
        with self._bars() as bars:
            task = bars.add_task(description, total=count)
            for item in items:
                yield item
                bars.advance(task)
        self.say(f"{description}: {count if count is not None else 'all'} done")

    @contextmanager
    def counter(self, description: str) -> Iterator[Callable[..., None]]:
        """Show a bar that is moved by calls of (done, total), or with another description as a third argument."""
        with self._bars() as bars:
            task = bars.add_task(description)

            def move(done: int, total: int, description: str | None = None) -> None:
                bars.update(task, completed=done, total=total, description=description)

            yield move

    def _bars(self) -> RichProgress:
        """Bars that vanish when done; none where standard error is no terminal."""
        return RichProgress(*columns(), console=self.console, transient=True, disable=not self.console.is_terminal)


def open_model(model: str, arch: str | None) -> Artifact:
    """Open a model, and tell what had to be assumed of its features.

    Raises:
        CompressError: As :meth:`Artifact.open`.
    """
    artifact = Artifact.open(model, arch)
    tell_assumption(model, artifact)
    return artifact


def tell_assumption(model: str, artifact: Artifact) -> None:
    """Say on standard error what had to be assumed of the features, where the model is an ONNX file and no artifact."""
    if artifact.front_end.assumption and model.endswith(".onnx"):
        click.echo(f"warning: {model}: {artifact.front_end.assumption}.", err=True)


def print_table(rows: Sequence[Mapping[str, Cell]]) -> None:
    """Print rows with the same keys as a table of its natural width: numbers to the right, long lists of names cut."""
    if not rows:
        return
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        numbers = any(isinstance(row[name], int) for row in rows)
        shown.add_column(name, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*map(cell, row.values()))
    Console(width=WIDEST, markup=False, highlight=False).print(shown)


def cell(value: Cell) -> str:
    """A value of a table as it is printed."""
    if isinstance(value, tuple):
        more = len(value) - MOST_NAMES
        return ", ".join(value[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"{value:,}" if isinstance(value, int) else value or ""


def print_rows(rows: Sequence[Mapping[str, Any]], sentences: Sequence[str] = ()) -> None:
    """Print the table, and below it what it says, and why a step was deferred or failed and what to do.

    The table has its natural width: in a narrow terminal its lines run over, but no figure is cut.
    """
    console = Console(width=WIDEST, markup=False, highlight=False)
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in table.COLUMNS:
        shown.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
    for figures in rows:
        shown.add_row(*table.cells(figures))
    console.print(shown)
    for sentence in sentences:
        click.echo(f"\n{sentence}")
    for figures in rows:
        if figures["reason"]:
            click.echo(f"\n{table.reason(figures)}")
        if figures["command"]:
            folder = (figures["artifact"] or {}).get("folder", "the artifact folder")
            click.echo(f"In {folder} on the target run:\n    {figures['command']}")
