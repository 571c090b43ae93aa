"""Copies level 0 of an image into a plain Zarr: what `convert.py` compares with, as a process of its own.

    python scripts/bench/plain_copy.py IMAGE OUT

Reads the same regions by the same readers in as many threads as there are cores, and writes them with the same codec
and chunks. No pyramid, no metadata, no marks of what is done, and nothing waits for the disk.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zarr
from zarr.codecs import ZstdCodec

from tiledseg.config import ConvertConfig
from tiledseg.images import open_image
from tiledseg.machine import n_cores
from tiledseg.pieces import pieces_of_source, plan_of


def main(source: str, output: str) -> int:
    """Copy; returns the exit code."""
    image = open_image(source)
    plan = plan_of(image, Path(output), ConvertConfig())
    codec = ZstdCodec(level=1, checksum=True)
    array = zarr.create_array(output, shape=image.shape, chunks=plan.chunks, dtype=image.dtype, compressors=codec)
    pieces = pieces_of_source(image, plan)

    def copy(number: int) -> None:
        array[pieces[number]] = image.read(0, pieces[number])

    with ThreadPoolExecutor(n_cores()) as pool:
        list(pool.map(copy, range(len(pieces))))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
