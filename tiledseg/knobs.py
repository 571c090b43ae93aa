"""Sliders of a tuner, of ipywidgets: a change makes the masks again and shows what it changed."""

from __future__ import annotations

import html
from typing import Any, Protocol

from .canvas import Picture
from .changes import COLOURS
from .config import MasksConfig
from .errors import TiledsegError

__all__ = ["panel"]

RANGES = {"flow_threshold": (0.0, 3.0, 0.05), "cellprob_threshold": (-6.0, 6.0, 0.1), "flow3d_smooth": (0.0, 6.0, 0.5)}
WIDTH = {"width": "32em"}


class Shown(Protocol):
    """What a tuner made."""

    @property
    def picture(self) -> Picture: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def n_objects(self) -> int: ...
    @property
    def n_gained(self) -> int: ...
    @property
    def n_lost(self) -> int: ...
    @property
    def n_changed(self) -> int: ...


class Tunable(Protocol):
    """A tuner."""

    @property
    def tunable(self) -> tuple[str, ...]: ...
    @property
    def start(self) -> MasksConfig: ...
    @property
    def shown(self) -> Shown: ...
    def __call__(self, **changed: Any) -> Shown: ...


def panel(tuner: Tunable) -> Any:
    """Sliders, picture and counts.

    Parameters
    ----------
    tuner : Tuner

    Returns
    -------
    panel : ipywidgets.VBox
        Its `knobs` are the sliders by the name of the setting.
    """
    import ipywidgets

    knobs = {name: _knob(name, getattr(tuner.start, name)) for name in tuner.tunable}
    picture = ipywidgets.Image(format="png", layout={"max_width": "100%"})
    text = ipywidgets.HTML()

    def show(shown: Shown) -> None:
        picture.format = "png" if shown.picture.is_small_as_png else "jpeg"
        picture.value = shown.picture.png if shown.picture.is_small_as_png else shown.picture.jpeg
        text.value = _counts(shown)

    def changed(_: Any) -> None:
        try:
            show(tuner(**{name: _value(name, knob.value) for name, knob in knobs.items()}))
        except TiledsegError as error:
            text.value = f'<span style="color:#b3261e">{html.escape(str(error))}</span>'

    for knob in knobs.values():
        knob.observe(changed, "value")
    show(tuner.shown)
    whole = ipywidgets.VBox([*knobs.values(), text, picture])
    whole.knobs = knobs
    return whole


def _knob(name: str, value: Any) -> Any:
    """The control of a setting."""
    import ipywidgets

    how: dict[str, Any] = {"description": name, "style": {"description_width": "11em"}}
    if isinstance(value, bool):
        return ipywidgets.Checkbox(value=value, **how)
    # Not while a slider is being dragged: every step would make the masks again.
    if name in RANGES:
        low, high, step = RANGES[name]
        ends = {"min": min(low, value), "max": max(high, value), "step": step}
        return ipywidgets.FloatSlider(value=value, **ends, continuous_update=False, layout=WIDTH, **how)
    if name == "min_size":
        return ipywidgets.IntSlider(
            value=value, min=0, max=max(500, 4 * value), continuous_update=False, layout=WIDTH, **how
        )
    how["description"] = f"{name} (0: {'auto' if name == 'niter' else 'no limit'})"
    number = 0 if value == "auto" else int(value)
    return ipywidgets.BoundedIntText(value=number, min=0, max=1_000_000_000, step=10, **how)


def _value(name: str, value: Any) -> Any:
    """A setting from what its control says."""
    return "auto" if name == "niter" and value == 0 else value


def _counts(shown: Shown) -> str:
    """How many objects there are, and what changed, in the colours of the outlines."""
    parts = [f"<b>{shown.n_objects:,}</b> objects"]
    for name, n in (("gained", shown.n_gained), ("lost", shown.n_lost), ("changed", shown.n_changed)):
        colour = "rgb({}, {}, {})".format(*COLOURS[name])
        mark = (
            f'<span style="background:{colour};display:inline-block;width:.9em;height:.9em;border-radius:2px"></span>'
        )
        parts.append(f"{mark} {n:,} {name}{' in shape' if name == 'changed' else ''}")
    settings = ", ".join(f"{name}={value!r}" for name, value in shown.settings.items())
    return " &emsp; ".join(parts) + f"<br><code>{html.escape(settings) or 'as by default'}</code>"
