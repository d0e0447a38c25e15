"""docs/results.md, of which every benchmark owns a section."""

import re
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "docs" / "results.md"
HEAD = "# Results\n\nTensorRT on T4 and Jetson: not measured.\n"


def write_section(script: str, text: str, part: str = "") -> None:
    """Put a section in the place of the one that the same script wrote before, or at the end.

    Args:
        script: Name of the benchmark, such as ``main_job``; the section says that it made it.
        text: Markdown.
        part: Where a script writes several sections, which of them.
    """
    name = f"{script} {part}".strip()
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\nMade by `python benchmarks/{script}.py`.\n\n{text.strip()}\n{end}\n"
    written = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else HEAD
    old = re.compile(rf"{re.escape(start)}.*?{re.escape(end)}\n", re.DOTALL)
    changed = old.sub(lambda _: section, written) if old.search(written) else f"{written.rstrip()}\n\n{section}"
    RESULTS.write_text(changed, encoding="utf-8")
