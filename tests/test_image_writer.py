"""Images out: read back by us, and judged by two independent validators."""

from __future__ import annotations

import dask.array as da
import numpy as np
import ome_zarr_models
import pytest
import yaozarrs
from hypothesis import given, settings
from hypothesis import strategies as st

from tiledseg.errors import OutputError, SettingsError
from tiledseg.images import open_image
from tiledseg.omezarr import write_image

RNG = np.random.default_rng(13)


def noise(*shape, dtype="uint16"):
    return RNG.integers(0, 250, shape).astype(dtype)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("axes", ["yx", "cyx", "tzyx", "tczyx"])
def test_images_are_valid(tmp_path, version, dtype, axes):
    array = noise(
        *{"yx": (40, 33), "cyx": (2, 40, 33), "tzyx": (2, 3, 40, 33)}.get(axes, (1, 2, 3, 40, 33)),
        dtype=dtype,
    )
    write_image(tmp_path / "a.zarr", array, axes=axes, version=version, chunk=16)
    yaozarrs.validate_zarr_store(str(tmp_path / "a.zarr"))
    ome_zarr_models.open_ome_zarr(str(tmp_path / "a.zarr"), version=version)
    image = open_image(tmp_path / "a.zarr")
    assert image.dtype == dtype
    assert image.spacing_um() is None
    for level in range(len(image.levels)):
        assert image.missing_chunks(level, tuple(slice(None) for _ in axes)) == []


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), chunk=st.integers(4, 20), lazy=st.booleans())
def test_means(tmp_path_factory, height, width, chunk, lazy):
    path = tmp_path_factory.mktemp("means") / "a.zarr"
    array = noise(2, height, width)
    write_image(path, da.from_array(array, chunks=7) if lazy else array, axes="cyx", chunk=chunk)
    image = open_image(path)
    before = array
    assert max(image.levels[-1].shape[1:]) <= chunk
    for level in range(len(image.levels)):
        pixels = image.read(level, (slice(None),) * 3)
        np.testing.assert_array_equal(pixels, before)
        padded = np.pad(before, [(0, 0), (0, before.shape[1] % 2), (0, before.shape[2] % 2)], mode="edge").astype(float)
        four = padded[:, ::2, ::2] + padded[:, 1::2, ::2] + padded[:, ::2, 1::2] + padded[:, 1::2, 1::2]
        before = np.rint(four / 4).astype("u2")


def test_write_image_refuses(tmp_path):
    array = noise(2, 9, 9)
    write_image(tmp_path / "a.zarr", array, axes="cyx", channels=["a", "b"])
    assert open_image(tmp_path / "a.zarr").channels == ("a", "b")
    with pytest.raises(OutputError, match=r"a\.zarr exists already"):
        write_image(tmp_path / "a.zarr", array, axes="cyx")
    for options in ({"channels": ["a"]}, {"spacing_um": (1.0,)}):
        with pytest.raises(SettingsError, match="give 2 channels and 2 spacings"):
            write_image(tmp_path / "b.zarr", array, axes="cyx", **options)
    for options in ({"axes": "yxc"}, {"axes": "cyx", "version": "0.3"}):
        with pytest.raises(SettingsError, match=r"cannot be written; use 'tczyx' in 0\.4 or 0\.5"):
            write_image(tmp_path / "b.zarr", array, **options)
    assert not (tmp_path / "b.zarr").exists()


def test_number_of_levels(tmp_path):
    write_image(tmp_path / "a.zarr", noise(64, 64), axes="yx", n_levels=2, chunk=8)
    assert len(open_image(tmp_path / "a.zarr").levels) == 2
