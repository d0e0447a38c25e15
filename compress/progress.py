"""Telling the user how far long work is. The library is silent; the command line shows bars."""

from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What long work reports to."""

    def say(self, text: str) -> None:
        """Tell in a line what is being done now."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass items through and show how many are done."""
        ...


class Silent:
    """Reports nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass the items through."""
        yield from items


def length(items: Iterable[object], total: int | None) -> int | None:
    """How many items there will be, where it can be known."""
    return total if total is not None else len(items) if isinstance(items, Sized) else None
