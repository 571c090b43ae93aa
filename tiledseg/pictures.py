"""Pictures: an image, reduced, with the outlines of its labels in colour; a histogram of diameters; PNG files.

The only home of Pillow. Neighbouring objects get different colours, so that it shows where one ends.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from .errors import ImageError, OutputError, SettingsError

__all__ = [
    "colour_map",
    "draw_outlines",
    "heat_map",
    "histogram",
    "outlined",
    "outlines_of",
    "overview",
    "png_of",
    "read_png",
]

# After Okabe and Ito's palette for all kinds of colour vision, without what drowns in the image.
ON_DARK = np.array(
    [[240, 228, 66], [86, 180, 233], [230, 159, 0], [0, 200, 140], [235, 120, 190], [235, 90, 20]], np.uint8
)
ON_LIGHT = np.array([[0, 0, 0], [0, 90, 255], [255, 60, 0], [0, 150, 40], [220, 0, 170], [0, 160, 170]], np.uint8)
N_COLOURS = len(ON_DARK)
# Matplotlib's viridis: as bright as the numbers are large, for all kinds of colour vision.
SCALE = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float64)
NOTHING = (128, 128, 128, 70)
BINS_PER_TICK = 4
LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.7

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer[Any]]


class PixelArray(Protocol):
    """Anything with a shape that gives pixels when sliced: NumPy, Zarr, Dask."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, region: Any, /) -> Any: ...


def overview(
    image: PixelArray,
    labels: PixelArray,
    path: Path,
    *,
    max_side: int = 1600,
    low: float | None = None,
    high: float | None = None,
    window: tuple[slice, slice] | None = None,
) -> None:
    """Write a PNG of an image with the outlines of its labels.

    Parameters
    ----------
    image : array, shape (y, x) or (y, x, 3)
        Grey or RGB; NumPy, Zarr or Dask.
    labels : array of integers, shape (y, x)
        Labels, 0 background.
    path : Path
        File to write, in a folder that exists.
    max_side : int
        Longest side of the picture, pixels. A larger image is reduced by taking every k-th pixel, and
        only those are kept in memory. One of half that size or less is shown at twice its size.
    low, high : float, optional
        Values shown black and white. Default: for 8-bit RGB 0 and 255, else the percentiles 1 and
        99.7 of the pixels shown.
    window : (slice, slice), optional
        Rows and columns to show. Default all.

    Raises
    ------
    SettingsError
        If the shapes do not fit, the window is empty, or `low` is not below `high`.
    OutputError
        If the file cannot be written.
    """
    from PIL import Image

    _save(Image.fromarray(outlined(image, labels, max_side=max_side, low=low, high=high, window=window)), path)


def outlined(
    image: PixelArray,
    labels: PixelArray,
    *,
    max_side: int = 1600,
    low: float | None = None,
    high: float | None = None,
    window: tuple[slice, slice] | None = None,
) -> Bytes:
    """The picture that :func:`overview` writes.

    Parameters are those of :func:`overview`.

    Returns
    -------
    picture : array of uint8, shape (y, x, 3)

    Raises
    ------
    SettingsError
        As there.
    """
    if len(image.shape) not in (2, 3) or (len(image.shape) == 3 and image.shape[2] != 3):
        raise SettingsError(f"image has shape {tuple(image.shape)}; give (y, x), or (y, x, 3) for RGB.")
    if tuple(labels.shape) != tuple(image.shape[:2]):
        raise SettingsError(
            f"labels have shape {tuple(labels.shape)} but the image {tuple(image.shape)}; "
            "give the labels of this image."
        )
    if max_side < 1:
        raise SettingsError(f"max_side is {max_side}; give 1 pixel or more.")
    region = _reduced_region(labels.shape, window, max_side)
    pixels = np.asarray(image[region])
    shown = np.asarray(labels[region])
    picture = np.ascontiguousarray(_as_bytes(pixels, low, high))
    # On a colourful picture a thin line is lost: there outlines are doubled with the pixels.
    is_thick = pixels.ndim == 3
    if is_thick:
        draw_outlines(picture, shown)
    if 2 * max(shown.shape) <= max_side:
        shown = shown.repeat(2, axis=0).repeat(2, axis=1)
        picture = picture.repeat(2, axis=0).repeat(2, axis=1)
    if not is_thick:
        draw_outlines(picture, shown)
    return picture


def histogram(
    sizes: npt.NDArray[np.float64], path: Path | BinaryIO, median: float, quartiles: tuple[float, float]
) -> None:
    """Write a PNG of how often diameters occur, with their median and quartiles.

    Parameters
    ----------
    sizes : array of float64, shape (n,), n > 0
        Diameters in pixels.
    path : Path or file
        File to write, in a folder that exists; or one that is open.
    median : float
        Marked by a line.
    quartiles : (float, float)
        Marked by a band.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, right, top, bottom = 900, 540, 70, 30, 60, 70
    tick, decimals = _tick(float(sizes.max()))
    end = tick * math.ceil(float(sizes.max()) / tick + 1e-9)
    n_bins = round(end / tick) * BINS_PER_TICK
    counts, edges = np.histogram(sizes, n_bins, (0, end))
    most = int(counts.max())

    def x(value: float) -> float:
        return left + (width - left - right) * value / end

    def y(count: float) -> float:
        return height - bottom - (height - top - bottom) * count / most

    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=18)
    draw.rectangle((x(quartiles[0]), top, x(quartiles[1]), y(0)), fill=(222, 235, 247))
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            draw.rectangle((x(start) + 1, y(count), x(stop) - 1, y(0)), fill=(66, 113, 174))
    draw.line((x(median), top, x(median), y(0)), fill=(213, 94, 0), width=3)
    draw.line((left, y(0), width - right, y(0)), fill="black", width=2)
    for i in range(round(end / tick) + 1):
        draw.line((x(i * tick), y(0), x(i * tick), y(0) + 6), fill="black", width=2)
        draw.text((x(i * tick), y(0) + 10), f"{i * tick:.{decimals}f}", fill="black", font=font, anchor="ma")
    draw.text(((left + width - right) / 2, height - 28), "diameter in pixels", fill="black", font=font, anchor="ma")
    draw.text((left - 10, y(most)), f"{most}", fill="black", font=font, anchor="rm")
    draw.text((left - 10, y(0)), "0", fill="black", font=font, anchor="rm")
    title = (
        f"{sizes.size} objects: median {median:.1f} px, half of them between {quartiles[0]:.1f} and {quartiles[1]:.1f}"
    )
    draw.text((left, 18), title, fill="black", font=font)
    _save(picture, path)


def heat_map(counts: npt.NDArray[np.integer[Any]]) -> bytes:
    """A PNG of numbers, one pixel each: the largest yellow, 1 dark blue, and 0 a grey that lets the page through.

    Parameters
    ----------
    counts : array of integers, shape (y, x)
        Not negative.

    Returns
    -------
    png : bytes
    """
    return colour_map(np.where(counts > 0, counts, np.nan), 0, max(1, int(counts.max(initial=0))))


def colour_map(values: npt.NDArray[np.floating[Any]], low: float, high: float) -> bytes:
    """A PNG of numbers, one pixel each: the lowest dark blue, the highest yellow, and none a grey that lets the page
    through.

    Parameters
    ----------
    values : array of floats, shape (y, x)
        NaN for none.
    low, high : float
        What gets the colours at either end; `low` below `high`.

    Returns
    -------
    png : bytes
    """
    share = (values - low) / (high - low)
    at = np.linspace(0, 1, len(SCALE))
    pixels = np.full((*values.shape, 4), 255, np.uint8)
    is_number = np.isfinite(share)
    for channel in range(3):
        pixels[is_number, channel] = np.rint(np.interp(share[is_number], at, SCALE[:, channel]))
    pixels[~is_number] = NOTHING
    return png_of(pixels)


def png_of(picture: Bytes) -> bytes:
    """A picture as a PNG.

    Parameters
    ----------
    picture : array of uint8, shape (y, x, 3 or 4)

    Returns
    -------
    png : bytes
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def read_png(path: Path, *, is_indexed: bool = False) -> npt.NDArray[Any]:
    """The pixels of a PNG.

    Parameters
    ----------
    path : Path
    is_indexed : bool
        Give the numbers of a picture with a palette instead of its colours: labels are stored so.

    Returns
    -------
    pixels : array, shape (y, x) or (y, x, 3)
        Without transparency.

    Raises
    ------
    ImageError
        If it is no picture.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            as_mode = {"1": "L", "P": "P" if is_indexed else "RGB"}.get(picture.mode, picture.mode)
            pixels = np.asarray(picture if as_mode == picture.mode else picture.convert(as_mode))
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} is no readable PNG ({error}); give a PNG or a TIFF.") from error
    if pixels.ndim == 2:
        return pixels
    return pixels[..., :3] if pixels.shape[-1] > 2 else pixels[..., 0]


def _tick(largest: float) -> tuple[float, int]:
    """Distance of the marks on an axis from 0 to a value, some 5 to 10 of them, and decimals to write them with."""
    power = math.floor(math.log10(largest))
    step = next(step for step in (0.1, 0.2, 0.5, 1.0) if largest / 10**power <= 10 * step)
    tick = step * 10.0**power
    return tick, max(0, -math.floor(math.log10(tick) + 1e-9))


def _save(picture: Any, path: Path | BinaryIO) -> None:
    """Write a picture as PNG."""
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise OutputError(
            f"cannot write picture {path}: {error.strerror or error}; give a file in a folder that exists "
            "and that you may write to."
        ) from error


def _reduced_region(shape: tuple[int, ...], window: tuple[slice, slice] | None, max_side: int) -> tuple[slice, slice]:
    """The window with the step that brings its longest side down to `max_side`."""
    wanted = window if window is not None else (slice(None), slice(None))
    rows, columns = (part.indices(length) for part, length in zip(wanted, shape, strict=True))
    if rows[2] != 1 or columns[2] != 1 or rows[0] >= rows[1] or columns[0] >= columns[1]:
        raise SettingsError(
            f"window {wanted} holds no pixels of an image of {tuple(shape)}, or skips some; "
            "give two slices without steps, inside the image."
        )
    step = -(-max(rows[1] - rows[0], columns[1] - columns[0]) // max_side)
    return slice(rows[0], rows[1], step), slice(columns[0], columns[1], step)


def _as_bytes(pixels: npt.NDArray[Any], low: float | None, high: float | None) -> Bytes:
    """Grey or RGB pixels as 8-bit RGB (y, x, 3), `low` black and `high` white."""
    is_ready = pixels.ndim == 3 and pixels.dtype == np.uint8
    values = pixels.astype(np.float32)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        finite = np.zeros(1, np.float32)
    bottom, top = (0.0, 255.0) if is_ready else np.percentile(finite, [LOW_PERCENTILE, HIGH_PERCENTILE])
    bottom = float(bottom) if low is None else low
    top = float(top) if high is None else high
    if top <= bottom:
        if low is not None or high is not None:
            raise SettingsError(f"low is {bottom} and high is {top}; give a low below high.")
        top = bottom + 1.0  # a constant image is shown black
    scaled = np.clip((np.nan_to_num(values, nan=bottom) - bottom) / (top - bottom), 0, 1)
    grey: Bytes = np.rint(255 * scaled).astype(np.uint8)
    if grey.ndim == 2:
        grey = grey[:, :, None].repeat(3, axis=2)
    return grey


def draw_outlines(picture: Bytes, labels: Labels, colours: Bytes | None = None) -> None:
    """Colour, in place, the outlines of objects.

    Parameters
    ----------
    picture : array of uint8, shape (y, x, 3)
    labels : array of integers, shape (y, x)
        0 background.
    colours : array of uint8, shape (n, 3), optional
        Of labels 0 to n - 1. Default: neighbours get different ones, that show on this picture.
    """
    is_outline = outlines_of(labels)
    if colours is not None:
        picture[is_outline] = colours[labels[is_outline]]
        return
    ids, flat = np.unique(labels, return_inverse=True)
    places = flat.reshape(labels.shape) + (0 if ids[0] == 0 else 1)  # 1.. for objects, 0 background
    chosen = _distinct_colours(places, int(places.max()))
    palette = ON_DARK if picture.mean() < 128 else ON_LIGHT
    picture[is_outline] = palette[chosen[places[is_outline]]]


def outlines_of(labels: Labels) -> npt.NDArray[np.bool_]:
    """The pixels of objects that have a 4-neighbour of another label."""
    is_outline = np.zeros(labels.shape, np.bool_)
    for low, high in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        differs = labels[low] != labels[high]
        is_outline[low] |= differs
        is_outline[high] |= differs
    is_outline &= labels > 0
    return is_outline


def _distinct_colours(places: npt.NDArray[np.intp], n_objects: int) -> npt.NDArray[np.intp]:
    """A colour for each object, 0..n_objects, that no neighbour before it has, if one is left."""
    found = []
    for low, high in (
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
        (np.s_[:-2], np.s_[2:]),
        (np.s_[:, :-2], np.s_[:, 2:]),
    ):
        pairs = np.stack([places[low].reshape(-1), places[high].reshape(-1)])
        found.append(np.sort(pairs[:, (pairs[0] != pairs[1]) & (pairs > 0).all(axis=0)], axis=0))
    colours = np.arange(n_objects + 1) % N_COLOURS
    earlier, later = np.unique(np.concatenate(found, axis=1), axis=1)
    order = np.argsort(later, kind="stable")
    last, taken = -1, set[int]()
    for i in order.tolist():
        if later[i] != last:
            last, taken = int(later[i]), set()
        taken.add(int(colours[earlier[i]]))
        # Redone with each neighbour; what stands after the last one avoids them all.
        first = last % N_COLOURS
        free = [(first + k) % N_COLOURS for k in range(N_COLOURS) if (first + k) % N_COLOURS not in taken]
        colours[last] = free[0] if free else first
    return colours
