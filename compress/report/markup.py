"""HTML and SVG as strings, escaped by construction: a plain str is text, only Markup is markup."""

from html import escape


class Markup(str):
    """Text that is already HTML or SVG. Every other str is escaped when it becomes a child."""

    __slots__ = ()


Child = str | None
Attribute = str | float | bool | None


def element(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """Build one element.

    Args:
        name: Tag name.
        children: Markup goes in as it is, any other text escaped, None not at all.
        attributes: ``class_`` is class, other underscores become hyphens; None and False leave the attribute out,
            True writes it without a value, and floats are rounded to two decimals.
    """
    opening = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Markup(f"{opening}{join(*children)}</{name}>")


def join(*children: Child, separator: str = "") -> Markup:
    """Put children one after another, escaping what is not markup; the separator is markup."""
    parts = (child if isinstance(child, Markup) else escape(child) for child in children if child is not None)
    return Markup(separator.join(parts))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = {"viewBox": key, "preserveAspectRatio": key}.get(key, key.rstrip("_").replace("_", "-"))
    if value is True:
        return f" {name}"
    return f' {name}="{escape(number(value) if isinstance(value, float) else str(value))}"'


def number(value: float) -> str:
    """Write a coordinate with at most two decimals and no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
