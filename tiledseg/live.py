"""Who is told of a run's progress if nobody is named: in a Jupyter notebook its reader, elsewhere nobody.

In a notebook one output is updated in place. What a saved notebook keeps is its last state, so that ends as a line of
text that says what was done: no bar is left at 0 %, none needs a widget to be seen.
"""

from __future__ import annotations

import contextlib
import html
import sys
import time
from collections.abc import Iterator
from typing import Any

from .bars import Bars
from .progress import Listener

__all__ = ["NotebookProgress", "in_notebook", "told"]

SHOW_AFTER_S = 0.7
"""A run that is over sooner shows nothing: hundreds of small pictures in a loop leave a notebook readable."""
UPDATE_EVERY_S = 0.25
WIDTH = "16em"


def in_notebook() -> bool:
    """Whether this process is a kernel of Jupyter."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def told(progress: Listener | bool | None) -> Iterator[Listener | None]:
    """Who is told of what is done meanwhile.

    Parameters
    ----------
    progress : callable or bool, optional
        A callable is taken as it is. True shows progress, in a notebook or in the terminal, False does not; None shows
        it in a notebook only.

    Returns
    -------
    listener : context manager of callable or None
        Ends what it shows.
    """
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not in_notebook()):
        yield None
        return
    shown = NotebookProgress() if in_notebook() else Bars()
    try:
        yield shown
    except BaseException as error:
        shown.close(error)
        raise
    shown.close()


class NotebookProgress:
    """A line per stage with a bar, in one output of a notebook; a line of text in the end."""

    def __init__(self) -> None:
        self._since = self._updated = time.perf_counter()
        self._stages: dict[str, tuple[int, int]] = {}
        self._ended: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._handle: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self._began.setdefault(stage, now)
        self._stages[stage] = (done, total)
        self._ended[stage] = now
        if now - self._since >= SHOW_AFTER_S and (self._handle is None or now - self._updated >= UPDATE_EVERY_S):
            self._updated = now
            self._show(self._text(), self._bars())

    def close(self, error: BaseException | None = None) -> None:
        """Leave what a reader of the notebook will want to know."""
        if self._handle is None:
            return
        seconds = _seconds_text(time.perf_counter() - self._since)
        if error is None:
            text = f"done in {seconds}: {self._text()}"
        else:
            how = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped by an error"
            text = f"{how} after {seconds}: {self._text()}"
        self._show(text, f"<div>{html.escape(text)}</div>")

    def _text(self) -> str:
        """How far each stage is."""
        return ", ".join(
            f"{stage} {total:,}" if done >= total else f"{stage} {done:,} of {total:,}"
            for stage, (done, total) in self._stages.items()
        )

    def _bars(self) -> str:
        rows = []
        for stage, (done, total) in self._stages.items():
            share = done / total if total else 1.0
            bar = (
                f'<div style="width:{WIDTH};background:rgba(128,128,128,.25)">'
                f'<div style="width:{share:.1%};height:.7em;background:#2f6db3"></div></div>'
            )
            cells = (html.escape(stage), bar, f"{done:,} of {total:,}", self._rest(stage))
            rows.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
        return "<table>" + "".join(rows) + "</table>"

    def _rest(self, stage: str) -> str:
        """How long a stage has taken, or will take."""
        (done, total), took = self._stages[stage], self._ended[stage] - self._began[stage]
        if done >= total:
            return _seconds_text(took)
        return "" if not done or took < 1 else f"about {_seconds_text(took * (total - done) / done)} left"

    def _show(self, text: str, page: str) -> None:
        from IPython.display import display

        content = {"text/plain": text, "text/html": page}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def _seconds_text(seconds: float) -> str:
    """A time for people."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
