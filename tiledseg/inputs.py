"""What the network is shown: a channel, several combined, or a stain unmixed from colours, for each of its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import SurveyConfig
from .errors import ImageError, SettingsError
from .frames import read_channel
from .grid import Region
from .images import Image, channel_index

__all__ = ["Input", "channels_of", "inputs_of", "inputs_text"]

STAINS = {"hematoxylin": 0, "eosin": 1, "dab": 2}
COLOURS = {"red": 0, "green": 1, "blue": 2}
GREY = {"grey", "gray"}
ROWS_AT_ONCE = 256
"""Of colours that are unmixed: the library takes ten times the memory of the pixels meanwhile."""


@dataclass(frozen=True)
class Input:
    """One input of the network.

    Attributes
    ----------
    channels : tuple of int
        Of the image.
    how : str
        What becomes of them if they are several: ``"max"``, ``"mean"``, or the name of a stain.
    """

    channels: tuple[int, ...]
    how: str = ""

    def read(self, image: Image, level: int, region: Region) -> npt.NDArray[Any]:
        """Its pixels in a region of a level: of the image's type if it is one channel, else float32."""
        if self.how in STAINS:
            return self._unmixed(image, level, region)
        values = read_channel(image, level, region, self.channels[0])
        if len(self.channels) == 1:
            return values
        combined = values.astype(np.float32)
        for channel in self.channels[1:]:
            further = read_channel(image, level, region, channel)
            if self.how == "max":
                np.maximum(combined, further, out=combined, casting="unsafe")
            else:
                combined += further.astype(np.float32)
        return combined if self.how == "max" else combined / np.float32(len(self.channels))

    def _unmixed(self, image: Image, level: int, region: Region) -> npt.NDArray[np.float32]:
        """How much of a stain there is: 0 for none."""
        from skimage.color import rgb2hed

        colours = np.stack([read_channel(image, level, region, channel) for channel in self.channels], axis=-1)
        shape = colours.shape[:-1]
        colours = colours.reshape(-1, shape[-1], len(COLOURS))
        unmixed = np.empty(colours.shape[:-1], np.float32)
        white = np.float32(np.iinfo(colours.dtype).max)
        for start in range(0, len(colours), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            unmixed[rows] = rgb2hed(colours[rows].astype(np.float32) / white)[..., STAINS[self.how]]
        return unmixed.reshape(shape)

    def text(self, image: Image) -> str:
        """In words, with the names of the channels."""
        names = ", ".join(image.channels[i] for i in self.channels)
        return f"{self.how} of {names}" if self.how else names


def inputs_text(image: Image, inputs: Sequence[Input]) -> str:
    """All inputs in words."""
    return "; ".join(single.text(image) for single in inputs)


def channels_of(inputs: Iterable[Input]) -> tuple[int, ...]:
    """Every channel that is read for some inputs."""
    return tuple(sorted({channel for single in inputs for channel in single.channels}))


def inputs_of(image: Image, survey: SurveyConfig, n_inputs: int, who: str) -> tuple[Input, ...]:
    """What each input of a network shows; inputs for which nothing is given stay empty.

    Parameters
    ----------
    image : Image
    survey : SurveyConfig
        ``channel``, ``nuclear_channel``, ``combine``, ``stain``, ``chan`` and ``chan2``.
    n_inputs : int
        How many inputs the network makes use of.
    who : str
        The network, for messages.

    Returns
    -------
    inputs : tuple of Input, at least one
        If nothing is said, the first channel; for networks of three inputs the first three.

    Raises
    ------
    ImageError
        If the image has no such channel.
    SettingsError
        If settings contradict each other, the network has no input for a nuclear channel, or a stain is to be
        unmixed from what are no three colours.
    """
    if survey.nuclear_channel is not None and n_inputs < 2:
        raise SettingsError(f"{who} takes a single channel; leave the nuclear channel out.")
    if survey.chan2 and n_inputs < 2:
        raise SettingsError(f"{who} takes a single channel; leave chan2 out.")
    is_stain = survey.stain != "none"
    if survey.chan is not None:
        return _by_number(image, survey.chan, survey.chan2)
    if survey.channel is None and survey.nuclear_channel is None and not is_stain and n_inputs > 2:
        return tuple(Input((i,)) for i in range(min(n_inputs, image.n_channels)))
    first = _stained(image, survey) if is_stain else _combined(image, survey.channel, survey.combine)
    if survey.nuclear_channel is None:
        return (first,)
    return first, _combined(image, survey.nuclear_channel, survey.combine)


def _by_number(image: Image, chan: int, chan2: int) -> tuple[Input, ...]:
    """Inputs by Cellpose's numbers: 0 is the mean of all, 1 the first channel, and so on."""
    if chan == 0:
        return (_of(tuple(range(image.n_channels)), "mean"),)
    wanted = (chan, chan2) if chan2 else (chan,)
    for number in wanted:
        if number > image.n_channels:
            raise ImageError(
                f"{image.name} has {image.n_channels} channels, so there is no chan {number}: 1 is the first (red), "
                "2 the second (green), 3 the third (blue), and 0 the mean of all."
            )
    return tuple(Input((number - 1,)) for number in wanted)


def _of(channels: tuple[int, ...], how: str) -> Input:
    return Input(channels, how if len(channels) > 1 else "")


def _combined(image: Image, wanted: Any, how: str) -> Input:
    """One channel, or several combined."""
    if not isinstance(wanted, tuple) and wanted not in image.channels and str(wanted) in GREY:
        return _of(tuple(range(image.n_channels)), "mean")
    return _of(_channels(image, wanted), how)


def _channels(image: Image, wanted: Any) -> tuple[int, ...]:
    """The channels that a name, an index, or several of them mean."""
    if isinstance(wanted, tuple):
        return tuple(channel for single in wanted for channel in _channels(image, single))
    if wanted in image.channels or wanted is None:
        return (channel_index(image, wanted),)
    parts = re.split(r"\s*,\s*", str(wanted).strip())
    if len(parts) > 1:
        return tuple(channel for part in parts for channel in _channels(image, part))
    if wanted in COLOURS and image.n_channels == len(COLOURS):
        return (COLOURS[wanted],)
    return (channel_index(image, wanted),)


def _stained(image: Image, survey: SurveyConfig) -> Input:
    """The stain of an image in colours."""
    if survey.channel is not None:
        colours = _channels(image, survey.channel)
    elif image.n_channels == len(COLOURS):
        colours = tuple(range(len(COLOURS)))
    else:
        colours = ()
    if len(colours) != len(COLOURS):
        raise SettingsError(
            f"stain {survey.stain} is unmixed from red, green and blue, and {image.name} has {image.n_channels} "
            "channels; say which are the colours, e.g. --channel 0,1,2."
        )
    if image.dtype.kind != "u":
        raise SettingsError(
            f"stain {survey.stain} is unmixed from colours as unsigned whole numbers, and {image.name} has "
            f"{image.dtype}; store the colours as uint8 or uint16."
        )
    return Input(colours, survey.stain)
