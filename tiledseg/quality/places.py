"""Small pictures of suspicious places: the image, if there is one, with the outlines of the labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..frames import image_region
from ..grid import Index, Region
from ..pictures import outlined, png_of
from .edges import Edge
from .subject import Subject

__all__ = ["Place", "place_of_edge", "place_of_object"]

SIDE = 320
"""Pixels of a picture, if an object needs no more."""
MOST_SIDE = 640
MOST_READ = 2048
"""Pixels of a line, along each axis, among which the place to show is looked for."""
MARK = np.array([255, 0, 200], np.uint8)
MARK_LENGTH = 14


@dataclass(frozen=True)
class Place:
    """A picture and what it shows.

    Attributes
    ----------
    text : str
        Where it is.
    png : bytes
    """

    text: str
    png: bytes


def place_of_edge(subject: Subject, frame: Index, edge: Edge) -> Place:
    """Show where along a line most objects end; marks at both ends of the line.

    Parameters
    ----------
    subject : Subject
    frame : tuple of int
    edge : Edge

    Returns
    -------
    place : Place
    """
    shape, axis = subject.object_shape, edge.axis
    others = [i for i in range(len(shape)) if i != axis]
    read = list(edge.region)
    for i in others:
        middle, half = (edge.region[i].start + edge.region[i].stop) // 2, MOST_READ // 2
        read[i] = slice(max(edge.region[i].start, middle - half), min(edge.region[i].stop, middle + half))
    low, high = np.moveaxis(subject.read(frame, tuple(read)), axis, 0)
    at = _fullest(low != high)
    point = [0] * len(shape)
    point[axis] = edge.position
    for i, found in zip(others, at, strict=True):
        point[i] = read[i].start + found
    rows, columns = (axis, len(shape) - 1) if axis < len(shape) - 1 else (len(shape) - 2, axis)
    marked = [slice(0, 0)] * len(shape)
    marked[axis] = slice(edge.position, edge.position)
    return _shown(subject, frame, tuple(point), (rows, columns), SIDE, marked)


def _fullest(is_face: npt.NDArray[np.bool_]) -> list[int]:
    """Middle of the stretch that has most faces, in the row that has most."""
    at = []
    while is_face.ndim > 1:
        best = int(is_face.reshape(len(is_face), -1).sum(axis=1).argmax())
        at.append(best)
        is_face = is_face[best]
    up_to = np.concatenate([[0], np.cumsum(is_face)])
    length = min(SIDE, is_face.size)
    return [*at, int((up_to[length:] - up_to[:-length]).argmax()) + length // 2]


def place_of_object(subject: Subject, frame: Index, row: npt.NDArray[np.int64]) -> Place:
    """Show one object; marks at the borders of the picture, where its box begins and ends.

    Parameters
    ----------
    subject : Subject
    frame : tuple of int
    row : array of int64, shape (1 + 2 * ndim,)
        See `sizes.Found`.

    Returns
    -------
    place : Place
    """
    ndim = len(subject.object_shape)
    low, high = row[1 : 1 + ndim], row[1 + ndim :]
    middle = tuple(int(i) for i in (low + high) // 2)
    side = max(SIDE // 2, *(int(1.5 * (high[i] - low[i])) for i in (ndim - 2, ndim - 1)))
    marked = [slice(int(a), int(b)) for a, b in zip(low, high, strict=True)]
    return _shown(subject, frame, middle, (ndim - 2, ndim - 1), side, marked)


def _shown(
    subject: Subject, frame: Index, point: Index, plane: tuple[int, int], side: int, marked: list[slice]
) -> Place:
    """A part of a plane round a point, with marks where something begins and ends along both axes."""
    shape = subject.object_shape
    region = [slice(i, i + 1) for i in point]
    for i in plane:
        start = max(0, min(point[i] - side // 2, shape[i] - side))
        region[i] = slice(start, min(start + side, shape[i]))
    window = tuple(region[i].stop - region[i].start for i in plane)
    labels = subject.read(frame, tuple(region)).reshape(window)
    picture = outlined(_pixels(subject, frame, tuple(region), window), labels, max_side=MOST_SIDE)
    for i, view, n in zip(plane, (picture, picture.transpose(1, 0, 2)), window, strict=True):
        for end in {marked[i].start, marked[i].stop} - {0}:
            at = (end - region[i].start) * len(view) // n
            for ticks in (slice(0, MARK_LENGTH), slice(-MARK_LENGTH, None)):
                view[max(0, at - 1) : at + 1, ticks] = MARK
    names = [f"{axis} {i}" for axis, i in zip(subject.axes, frame, strict=False)]
    names += [
        f"{axis} {part.start}:{part.stop}" if i in plane else f"{axis} {part.start}"
        for i, (axis, part) in enumerate(zip(subject.object_axes, region, strict=True))
    ]
    return Place(", ".join(names), png_of(picture))


def _pixels(subject: Subject, frame: Index, region: Region, window: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """What the image shows there: its colours if it has three of 8 bits, else one channel; black without an image."""
    image = subject.image
    if image is None:
        return np.zeros(window, np.uint8)
    where = (*(slice(i, i + 1) for i in frame), *region)
    if subject.channel is not None:
        return image.read(0, image_region(image, where, subject.channel)).reshape(window)
    values = image.read(0, image_region(image, where, None))
    return np.moveaxis(values, image.axes.index("c"), -1).reshape((*window, 3))
