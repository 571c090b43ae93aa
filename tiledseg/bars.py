"""Progress bars for terminals."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Bars"]


class Bars:
    """A progress bar per stage, with rate and remaining time; those of stages at work at once below each other."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage not in self._bars:
            self._close([name for name, bar in self._bars.items() if bar.n >= bar.total])
            self._bars[stage] = tqdm(
                total=total, initial=done, desc=f"{stage:>8}", unit=" pieces", file=sys.stderr, position=len(self._bars)
            )
        bar = self._bars[stage]
        bar.total = total  # a stage that begins anew, as the windows of a diameter do, may have more pieces
        bar.update(done - bar.n)

    def close(self, error: BaseException | None = None) -> None:  # noqa: ARG002
        """End the bars that are shown."""
        self._close(list(self._bars))

    def _close(self, stages: list[str]) -> None:
        for stage in stages:
            self._bars.pop(stage).close()
