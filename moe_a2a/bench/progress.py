"""Progress on stderr: a bar on a terminal with rich, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from moe_a2a.bench.events import Event, Note, Progress, Results

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Display"]


class Display:
    """Shows events as they come, keeps the results, and gives the cursor back when left."""

    def __init__(self) -> None:
        self.results: Results | None = None
        self._bar = _rich_bar() if sys.stderr.isatty() else None
        self._task: Any = None

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting the ranks", total=None)
            self._bar.refresh()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """What `launch` is given as ``show``."""
        if isinstance(event, Results):
            self.results = event
            if self._bar is not None:
                self._bar.update(self._task, completed=1, total=1, description="done")
        elif isinstance(event, Note):
            self._line(event.text)
        elif isinstance(event, Progress):
            if self._bar is None:
                self._line(f"[{event.done + 1}/{event.total}] {event.label}")
            else:
                self._bar.update(
                    self._task,
                    completed=event.done,
                    total=event.total,
                    description=event.label,
                    refresh=True,
                )

    def _line(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, highlight=False)


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        print("for a progress bar: pip install 'moe-a2a[bench]'", file=sys.stderr, flush=True)
        return None
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # No refresh by a thread: it would take time from the ranks that are being measured.
    return Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
