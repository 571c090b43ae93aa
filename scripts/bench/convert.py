"""Conversion of a slide: memory of all processes, and speed beside a plain copy of its pixels.

    python scripts/bench/convert.py [--side 16384] [--repeat 2] [--toy] [--save FILE]

Two images of 16384² pixels: a slide as Aperio's scanners write it (SVS, red, green and blue in JPEG), a section of
tissue laid side by side; and a fluorescence picture of 16 bits in a TIFF with compressed tiles. `tiledseg convert`
writes them with a pyramid, checksums and files that are on the disk; `plain_copy.py` reads the same regions by the
same readers and writes level 0 with the same codec, and nothing else. Both run as processes of their own, from
nothing, in turn; of several runs the fastest counts.

All processes together must stay below 1 GiB, and the conversion must be at least half as fast as the copy.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from process import run_measured
from report import Table, Target, finish, parser, save

import tiledseg
from tiledseg.images import open_image
from tiledseg.machine import n_cores
from tiledseg.slides import synthetic_slide

HERE = Path(__file__).parent
SIDE = 16384
TOY_SIDE = 2500
TILE = 256
LIMIT_GIB = 1.0
LEAST_SPEED = 0.5
CHECKED = 300
"""Pixels along y and x that are compared with the source, in the middle and at the far corner."""
COLUMNS = {
    "image": 10,
    "side": 7,
    "convert s": 11,
    "copy s": 9,
    "speed": 8,
    "MPx/s": 8,
    "GiB": 8,
    "sum GiB": 9,
    "MB": 7,
}


def _repeated(piece: npt.NDArray[Any], side: int) -> Iterator[npt.NDArray[Any]]:
    """Tiles of a piece laid side by side up to a size, row by row."""
    at = [np.arange(start, start + TILE) % piece.shape[0] for start in range(0, side, TILE)]
    for rows in at:
        for columns in at:
            yield np.ascontiguousarray(piece[np.ix_(rows, columns)])


def write_slide(path: Path, side: int) -> None:
    """A slide of colours, in JPEG."""
    from skimage.data import immunohistochemistry

    piece = np.asarray(immunohistochemistry())
    text = f"Aperio Image Library v11.2.1\r\n{side}x{side} [0,0 {side}x{side}] (256x256) JPEG/RGB Q=75|MPP = 0.25"
    tifffile.imwrite(
        path,
        _repeated(piece, side),
        shape=(side, side, 3),
        dtype=piece.dtype,
        tile=(TILE, TILE),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 75},
        description=text,
        metadata=None,
        software=False,
    )


def write_fluorescence(path: Path, side: int) -> None:
    """A picture of 16 bits, in compressed tiles."""
    piece, _ = synthetic_slide((1024, 1024), diameter=24, seed=1)
    tiles = _repeated(piece, side)
    tifffile.imwrite(
        path, tiles, shape=(side, side), dtype=piece.dtype, tile=(TILE, TILE), compression="zlib", bigtiff=True
    )


def measure(folder: Path, source: Path, side: int, repeat: int) -> dict[str, Any]:
    """Convert and copy an image in turn; a row of the table."""
    commands = {
        "convert": [sys.executable, "-m", "tiledseg.cli", "convert", str(source), str(folder / "convert")],
        "copy": [sys.executable, str(HERE / "plain_copy.py"), str(source), str(folder / "copy")],
    }
    env = {"PYTHONPATH": str(Path(tiledseg.__file__).parents[1])}
    row: dict[str, Any] = {"image": source.suffix[1:], "side": side}
    seconds: dict[str, float] = {}
    for _ in range(repeat):
        for name, command in commands.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            measured = run_measured(command, folder, cores=n_cores(), env=env)
            if measured.code:
                return {**row, **measured.failure}
            seconds[name] = min(measured.seconds, seconds.get(name, np.inf))
            if name == "convert":
                row["GiB"] = max(measured.together_peak / 2**30, row.get("GiB", 0.0))
                row["sum GiB"] = max(measured.total_peak / 2**30, row.get("sum GiB", 0.0))
    return {
        **row,
        "convert s": seconds["convert"],
        "copy s": seconds["copy"],
        "speed": seconds["copy"] / seconds["convert"],
        "MPx/s": side**2 / 1e6 / seconds["convert"],
        "MB": sum(file.stat().st_size for file in (folder / "convert").rglob("*") if file.is_file()) / 1e6,
        "differ": n_different(source, folder / "convert"),
    }


def n_different(source: Path, converted: Path) -> int:
    """Pixels in which level 0 differs from the source, in two places."""
    before, after = open_image(source), open_image(converted)
    count = 0
    for start in (before.shape[-1] // 2, before.shape[-1] - CHECKED):
        channels = [slice(0, n) for n in before.shape[:-2]]
        region = (*channels, slice(start, start + CHECKED), slice(start, start + CHECKED))
        count += int((before.read(0, region) != after.read(0, region)).sum())
    return count


def targets_of(rows: list[dict[str, Any]]) -> list[Target]:
    """What the rows are held against."""
    nothing = float("nan")
    targets = []
    for row in rows:
        name = row["image"]
        targets += [
            Target(f"{name}: GiB of all processes", row.get("sum GiB", nothing), LIMIT_GIB, at_least=False),
            Target(f"{name}: speed beside a plain copy", row.get("speed", nothing), LEAST_SPEED),
            Target(f"{name}: pixels that differ", row.get("differ", nothing), 0, at_least=False, needs_size=False),
        ]
    return targets


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--side", type=int, default=SIDE, metavar="PX")
    made.add_argument("--repeat", type=int, default=2, metavar="N", help="runs of each, of which the fastest counts")
    options = made.parse_args(arguments)
    side, repeat = (TOY_SIDE, 1) if options.toy else (options.side, options.repeat)
    table = Table(COLUMNS)
    for name, write in {"slide.svs": write_slide, "cells.tif": write_fluorescence}.items():
        with tempfile.TemporaryDirectory(prefix="tiledseg-bench-") as folder:
            source = Path(folder) / name
            write(source, side)
            table.add(measure(Path(folder), source, side, repeat))
        save(options.save, table.rows)
    return finish(targets_of(table.rows), table.rows, toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
