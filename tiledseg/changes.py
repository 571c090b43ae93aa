"""What other settings change: which objects are gained, lost or of another shape, by their outlines in colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .canvas import Colour
from .pictures import outlines_of
from .seams import match_seam

__all__ = ["COLOURS", "Changes", "changes_between", "draw_changes"]

MIN_IOU = 0.5
SAME_IOU = 0.8
"""Below, an object has another shape. A threshold of pixels moves every outline a little: that is no news."""

Labels = npt.NDArray[np.uint32]

SAME_ON_DARK: Colour = (220, 220, 220)
SAME_ON_LIGHT: Colour = (70, 70, 70)
COLOURS: dict[str, Colour] = {"gained": (86, 180, 233), "lost": (235, 90, 20), "changed": (240, 228, 66)}
"""After Okabe and Ito's palette for all kinds of colour vision."""


@dataclass(frozen=True, eq=False)
class Changes:
    """Objects before and now.

    Attributes
    ----------
    is_gained, is_changed : array of bool, shape (n now + 1,)
        Of each label now: overlaps no object of before by half (IoU), or overlaps one by less than 0.8.
    is_lost : array of bool, shape (n before + 1,)
        Of each label before: overlaps none of now by half.
    """

    is_gained: npt.NDArray[np.bool_]
    is_changed: npt.NDArray[np.bool_]
    is_lost: npt.NDArray[np.bool_]

    @property
    def counts(self) -> dict[str, int]:
        """How many are ``gained``, ``lost`` and ``changed``."""
        parts = {"gained": self.is_gained, "lost": self.is_lost, "changed": self.is_changed}
        return {name: int(part.sum()) for name, part in parts.items()}


def changes_between(before: Labels, now: Labels) -> Changes:
    """Compare labels of the same pixels.

    Parameters
    ----------
    before, now : array of uint32, the same shape
        0 background.
    """
    pairs, ious = match_seam(before, now, MIN_IOU)
    is_gained, is_lost = (np.ones(int(labels.max(initial=0)) + 1, np.bool_) for labels in (now, before))
    is_gained[0] = is_lost[0] = False
    is_lost[pairs[:, 0]] = is_gained[pairs[:, 1]] = False
    is_changed = np.zeros(is_gained.size, np.bool_)
    is_changed[pairs[ious < SAME_IOU, 1]] = True
    return Changes(is_gained, is_changed, is_lost)


def draw_changes(picture: npt.NDArray[np.uint8], before: Any, now: Any, changes: Changes) -> None:
    """Outline objects in place: those of now, and those of before that are lost.

    Parameters
    ----------
    picture : array of uint8, shape (y, x, 3)
    before, now : array of integers, shape (y, x)
        Labels at its pixels.
    changes : Changes
        Of these labels.
    """
    colours = np.empty((changes.is_gained.size, 3), np.uint8)
    colours[:] = SAME_ON_DARK if picture.mean() < 128 else SAME_ON_LIGHT
    colours[changes.is_changed] = COLOURS["changed"]
    colours[changes.is_gained] = COLOURS["gained"]
    is_outline = outlines_of(now)
    picture[is_outline] = colours[now[is_outline]]
    picture[outlines_of(np.where(changes.is_lost[before], before, 0))] = COLOURS["lost"]
