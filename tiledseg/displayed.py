"""What shows itself in Jupyter.

How things look there is the business of `notebook`, which lies far above the things themselves; so it is looked up
only when one is shown.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

__all__ = ["Displayed", "place_text"]


class Displayed:
    """Something of which `notebook` has a view."""

    def _repr_html_(self) -> str:
        text: str = importlib.import_module(".notebook", __package__).html_of(self)
        return text


def place_text(place: object) -> str | None:
    """Where something is, for people: from the present folder if it lies in it; None of nothing."""
    if place is None:
        return None
    is_here = "://" not in str(place) and Path(str(place)).is_relative_to(Path.cwd())
    return os.path.relpath(str(place)) if is_here else str(place)
