"""A table on the terminal: rich's where it is installed, aligned text elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["aligned", "print_table"]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints to stdout; the first column is text, the others figures. An empty row is a rule."""
    if not (sys.stdout.isatty() and _print_rich(title, header, rows)):
        print(aligned(title, header, rows), flush=True)


def _print_rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    if Console().width < len(aligned("", header, rows).splitlines()[-1]) + 2:
        return False  # rich would cut the figures
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    Console().print(table)
    return True


def aligned(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text."""
    filled = [row for row in (header, *rows) if row]
    widths = [max(len(row[column]) for row in filled) for column in range(len(header))]
    lines = [title] if title else []
    for row in (header, [], *rows):
        if row:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        else:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
