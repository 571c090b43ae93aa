"""Any function in the place of the network: the same labels whatever the blocks, or agreement below 1."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import tiledseg
from tiledseg.errors import ImageError, SegmenterError, SettingsError
from tiledseg.omezarr import write_image
from tiledseg.segmenters import Segmenter, drop_small, identity_of, name_of
from tiledseg.store import MemoryStore

SHAPE = (300, 233)
HALO = 32
BLOCKS = [64, 77, 100, 150, 232, 299, 512]


@pytest.fixture(scope="module")
def picture() -> npt.NDArray[np.uint16]:
    """Bright blobs of up to 24 px on a dark ground, no two of them touching; every block has some."""
    rng = np.random.default_rng(5)
    image = rng.integers(0, 100, SHAPE).astype(np.uint16)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    for row in range(0, SHAPE[0], 26):
        for column in range(0, SHAPE[1], 26):
            radii = rng.uniform(4, 12, 2)
            inside = ((y - row - 12) / radii[0]) ** 2 + ((x - column - 12) / radii[1]) ** 2 < 1
            image[inside] += np.uint16(rng.integers(1000, 3000))
    return image


def above(pixels: npt.NDArray[Any], threshold: float = 500) -> npt.NDArray[np.int32]:
    """Connected parts above a threshold: depends on nothing but the pixels of the object."""
    from scipy.ndimage import label

    labels: npt.NDArray[np.int32] = label(pixels > threshold)[0]
    return labels


def in_raster_order(labels: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Labels 1..n by where objects begin: what a whole image must give."""
    ids, first = np.unique(labels, return_index=True)
    ids, first = ids[ids > 0], first[ids > 0]
    table = np.zeros(int(labels.max()) + 1, np.uint32)
    table[ids[np.argsort(first)]] = np.arange(1, ids.size + 1)
    return table[labels]


def labels_by(function: Any, image: Any, output: Any = None, **settings: Any) -> npt.NDArray[np.uint32]:
    found = tiledseg.segment(image, output, segmenter=function, **{"halo": HALO, **settings})
    return np.asarray(found.labels.compute())


@pytest.fixture(scope="module")
def whole(picture: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint32]:
    return in_raster_order(above(picture))


@pytest.fixture
def image_path(picture: npt.NDArray[np.uint16], tmp_path: Path) -> Path:
    path = tmp_path / "picture.ome.zarr"
    write_image(path, picture, axes="yx", spacing_um=(0.5, 0.5), chunk=64)
    return path


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_give_what_the_whole_image_gives(
    picture: npt.NDArray[np.uint16], whole: npt.NDArray[np.uint32], block: int
) -> None:
    found = tiledseg.segment(picture, segmenter=above, halo=HALO, block=block)
    assert whole.max() > 90
    assert np.array_equal(found.labels.compute(), whole)
    assert found.table["label"].to_pylist() == list(range(1, int(whole.max()) + 1))
    assert found.table["area"].to_pylist() == np.bincount(whole.ravel())[1:].tolist()
    report = found.report
    assert report.n_exact_pairs == report.n_pairs
    assert (report.n_pairs > 0) == (report.n_blocks > 1 and block != 232)  # 232 leaves one column, empty
    assert (report.n_cut_by_halo, report.n_tiles, report.n_skipped_blocks) == (0, 0, 0)


def test_the_report_says_what_there_was_instead_of_a_network(picture: npt.NDArray[np.uint16]) -> None:
    report = tiledseg.segment(picture, segmenter=above, halo=HALO).report
    assert report.segmenter == f"{__name__}.above"
    assert (report.diameter, report.percentiles, report.device) == (None, None, None)
    assert set(report.seconds) == {"masks", "stitch", "publish"}
    report = tiledseg.segment(picture, segmenter=above, diameter=24).report
    assert report.diameter is not None
    assert (report.diameter.value, report.diameter.source) == (24.0, "given")


def test_workers_give_the_same_and_nothing_is_done_twice(
    image_path: Path, whole: npt.NDArray[np.uint32], tmp_path: Path, client: Any
) -> None:
    threshold = 500

    def captured(pixels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        return above(pixels, threshold)

    functions: list[Callable[..., Any]] = [captured, functools.partial(above)]
    for i, function in enumerate(functions):
        output = tmp_path / f"{i}.zarr"
        assert np.array_equal(labels_by(function, image_path, output, block=120, client=client), whole)
        again = tiledseg.segment(image_path, output, segmenter=function, halo=HALO, block=120, client=client)
        assert sum(again.report.computed.values()) == 0
        assert again.report.kept["masks"] == 6
    assert np.array_equal(labels_by(above, image_path, tmp_path / "own.zarr", block=100, workers=1), whole)


def test_an_array_and_a_function_are_sent_to_workers(
    picture: npt.NDArray[np.uint16], whole: npt.NDArray[np.uint32], tmp_path: Path, client: Any
) -> None:
    assert np.array_equal(labels_by(above, picture, tmp_path / "a.zarr", block=150, client=client), whole)


def test_a_function_is_unpacked_once_per_process(image_path: Path, tmp_path: Path, client: Any) -> None:
    class Counting:
        """Stands for a model that is costly to load."""

        def __init__(self) -> None:
            self.n_loaded = 0

        def __setstate__(self, state: dict[str, int]) -> None:
            sys.tiledseg_test_loads = getattr(sys, "tiledseg_test_loads", 0) + 1  # type: ignore[attr-defined]
            self.__dict__.update(state)

        def __call__(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
            return above(pixels)

    tiledseg.segment(image_path, tmp_path / "a.zarr", segmenter=Counting(), halo=HALO, block=64, client=client)
    loads = client.run(lambda: getattr(__import__("sys"), "tiledseg_test_loads", 0))
    assert max(loads.values()) == 1


def test_a_killed_run_goes_on_and_only_with_the_same_function(
    image_path: Path, whole: npt.NDArray[np.uint32], tmp_path: Path, client: Any
) -> None:
    output, flag = tmp_path / "out.zarr", tmp_path / "broken"
    flag.touch()

    def fragile(pixels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        if flag.exists() and pixels.shape == (92, 145):  # the last of six blocks
            raise MemoryError("not today")
        return above(pixels)

    def run(function: Any, **settings: Any) -> Any:
        return tiledseg.segment(image_path, output, segmenter=function, halo=HALO, block=120, client=client, **settings)

    with pytest.raises(SegmenterError, match="not today"):
        run(fragile)
    with pytest.raises(SettingsError, match=r"segmenter was '.*fragile \w+' and is now '.*above \w+'; use the same"):
        run(above)
    with pytest.raises(SettingsError, match=r"segmenter was '.*fragile \w+' and is now None"):
        tiledseg.segment(image_path, output, diameter=24.0, block=120, client=client)
    flag.unlink()
    ended = run(fragile)
    assert ended.report.kept["masks"] > 0
    assert ended.report.kept["masks"] + ended.report.computed["masks"] == ended.report.n_blocks
    assert np.array_equal(ended.labels.compute(), whole)
    other = run(fragile, min_size=200)
    assert 0 < other.report.n_objects < whole.max()
    assert run(above, restart=True).report.kept["masks"] == 0


def test_a_function_that_fails_at_once_leaves_nothing_behind(image_path: Path, tmp_path: Path) -> None:
    def broken(_: Any) -> None:
        raise ValueError("no licence")

    for _ in range(2):  # the second try is not stopped by what the first left
        with pytest.raises(SegmenterError, match="no licence"):
            tiledseg.segment(image_path, segmenter=broken, halo=HALO, block=150)
        assert not (image_path / "labels").exists()
        assert [path.name for path in tmp_path.iterdir()] == [image_path.name]
    assert tiledseg.segment(image_path, segmenter=above, halo=HALO).report.n_objects > 0


def test_blocks_that_disagree_still_give_one_label_per_object(
    picture: npt.NDArray[np.uint16], whole: npt.NDArray[np.uint32]
) -> None:
    from scipy.ndimage import binary_dilation, label

    def sloppy(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Outlines that depend on where the block ends."""
        mask = pixels > 500
        return label(binary_dilation(mask) if pixels.shape[1] == 79 + HALO else mask)[0]  # type: ignore[no-any-return]

    found = tiledseg.segment(picture, segmenter=sloppy, halo=HALO, block=79)
    labels = found.labels.compute()
    assert found.report.n_objects == whole.max()
    cores = np.where(whole > 0, labels, 0)
    pairs = np.unique(np.stack([whole[whole > 0], cores[whole > 0]]), axis=1)
    assert pairs.shape[1] == whole.max(), "an object has two labels, or a label two objects"
    assert 0 < found.report.n_exact_pairs < found.report.n_pairs


def test_automatic_halo_grows_where_an_object_is_cut() -> None:
    image = np.zeros((200, 200), np.uint8)
    image[90:110, 5:195] = 1
    found = tiledseg.segment(image, segmenter=lambda pixels: above(pixels, 0), diameter=10, block=64)
    assert found.report.n_objects == 1
    assert found.report.n_cut_by_halo == 3  # of four blocks in its row one sees it whole, with four times the halo
    narrow = tiledseg.segment(image, segmenter=lambda pixels: above(pixels, 0), diameter=25, block=64)
    assert narrow.report.n_cut_by_halo == 0
    assert narrow.report.n_exact_pairs == narrow.report.n_pairs > 0
    fixed = tiledseg.segment(image, segmenter=lambda pixels: above(pixels, 0), halo=40, block=64)
    assert fixed.report.n_cut_by_halo > 0
    assert np.array_equal(fixed.labels.compute(), image)


def test_a_function_gets_the_pixels_as_they_are(picture: npt.NDArray[np.uint16], tmp_path: Path) -> None:
    image = np.stack([picture, picture // 2])[:, :90, :80]
    seen: dict[str, Any] = {}

    def look(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        seen["pixels"] = pixels.copy()
        pixels[:] = 0  # its own copy, not the caller's array
        return np.zeros(pixels.shape[-2:], np.uint8)

    before = image.copy()
    for given_image in (image, image.astype(">f4")):
        for channel, expected in ((1, given_image[1]), (None, given_image[0]), ("all", given_image)):
            found = tiledseg.segment(given_image, segmenter=look, halo=0, channel=channel, axes="cyx")
            assert np.array_equal(seen["pixels"], expected)
            assert seen["pixels"].dtype == given_image.dtype.newbyteorder("=")
            assert found.report.n_objects == 0
    assert np.array_equal(image, before)
    write_image(tmp_path / "two.ome.zarr", image, axes="cyx", channels=["all", "DAPI"])
    tiledseg.segment(tmp_path / "two.ome.zarr", segmenter=look, halo=0, channel="all")
    assert np.array_equal(seen["pixels"], image[0]), "a channel of that name comes first"


def test_every_channel_of_an_image_without_channels(picture: npt.NDArray[np.uint16]) -> None:
    both = labels_by(lambda pixels: above(pixels[0]), picture, block=100, channel="all")
    assert np.array_equal(both, labels_by(above, picture, block=100))


def test_ids_with_gaps_and_parts_apart_are_taken_as_they_are(picture: npt.NDArray[np.uint16]) -> None:
    def odd(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        labels = above(pixels).astype(np.uint64)
        return np.where(labels > 0, np.uint64(2**32 - 1) - labels * np.uint64(7), np.uint64(0))

    assert np.array_equal(labels_by(odd, picture, block=100), in_raster_order(above(picture)))
    two = np.zeros((80, 200), np.uint8)
    two[10:20, 90:97] = two[10:20, 103:110] = 1  # one object in two parts, on both sides of a seam
    found = tiledseg.segment(two, segmenter=lambda pixels: pixels.copy(), halo=40, block=100)
    assert found.report.n_objects == 1
    assert np.array_equal(found.labels.compute(), two)


def test_small_objects_stay_unless_a_size_is_given() -> None:
    image = np.zeros((60, 120), np.uint8)
    image[5, 5] = image[40:44, 58:63] = 1
    one_each = functools.partial(above, threshold=0)
    assert labels_by(one_each, image, block=60).max() == 2
    assert np.array_equal(labels_by(one_each, image, block=60, min_size=20), image * (np.arange(60) > 30)[:, None])
    assert labels_by(one_each, image, block=60, min_size=21).max() == 0


@given(st.lists(st.sampled_from([0, 1, 2, 3, 7, 1000, 2**32 - 1]), min_size=1, max_size=30), st.integers(0, 5))
def test_ids_become_dense_and_small_objects_go(values: list[int], min_size: int) -> None:
    image = np.array(values, np.int64)[None]
    labels = Segmenter.of(lambda pixels: pixels).label(image, "here", MemoryStore())
    ids, index = np.unique(np.append(image, 0), return_inverse=True)
    assert np.array_equal(labels.ravel(), index[:-1])
    kept = drop_small(labels, min_size)
    sizes = np.bincount(labels.ravel(), minlength=ids.size)
    assert np.array_equal(kept, np.where(sizes[labels] >= min_size, labels, 0))


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "None": (lambda _: None, "None"),
    "tuple": (lambda pixels: (above(pixels), {}), "a tuple"),
    "shape": (lambda pixels: above(pixels)[1:], "an array of shape (299, 233)"),
    "float": (lambda pixels: above(pixels).astype(float), "an array of float64"),
    "bool": (lambda pixels: pixels > 500, "an array of bool"),
    "negative": (lambda pixels: above(pixels) - 1, "the id -1"),
    "large": (lambda pixels: (above(pixels) > 0) * np.int64(2**32), "the id 4294967296"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_labels_is_refused(picture: npt.NDArray[np.uint16], kind: str) -> None:
    function, text = BAD[kind]
    with pytest.raises(SegmenterError) as caught:
        tiledseg.segment(picture, segmenter=function, halo=HALO, block=300)
    assert str(caught.value) == (
        f"segmenter tests.test_segmenter.<lambda> returned {text} for block (0, 0) (y 0:300, x 0:233); return an "
        "array of shape (300, 233) with whole numbers from 0 (background) to 4294967295."
    )


def test_a_failing_function_is_named_with_its_block_and_chained(
    image_path: Path, tmp_path: Path, client: Any, picture: npt.NDArray[np.uint16]
) -> None:
    def failing(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if pixels.shape == (92, 145):  # the last of six blocks
            raise KeyError("StarDist")
        return above(pixels)

    text = (
        r"segmenter tests.test_segmenter.*failing failed in block \(2, 1\) \(y 208:300, x 88:233\) with "
        r"KeyError: 'StarDist'; correct it and run again, with restart=True if blocks are done\."
    )
    with pytest.raises(SegmenterError, match=text) as caught:
        tiledseg.segment(picture, segmenter=failing, halo=HALO, block=120)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(SegmenterError, match=text):
        tiledseg.segment(image_path, tmp_path / "out.zarr", segmenter=failing, halo=HALO, block=120, client=client)


def test_settings_of_the_network_are_refused(picture: npt.NDArray[np.uint16]) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(SettingsError) as caught:
            tiledseg.segment(picture, segmenter=settings.pop("segmenter", above), **settings)
        return str(caught.value)

    assert refused() == (
        "a segmenter needs to know how far to read around a block; give halo in pixels, at least the size of the "
        "largest objects, or diameter, of which it takes two."
    )
    assert refused(halo=9, niter=20, model="tiledseg-nuclei", device="cpu") == (
        "device, model, niter cannot be given with a segmenter, only with the network and its masks; leave them out."
    )
    assert "flow_threshold cannot be given" in refused(halo=9, flow_threshold=0.4)
    assert "unknown setting 'hallo'" in refused(hallo=9)
    assert "block 64 is smaller than the halo of 80 px" in refused(diameter=40, block=64)
    assert "segmenter must be a function from a block of pixels to labels, not str." in refused(
        segmenter="stardist", halo=9
    )
    with pytest.raises(ImageError, match="no channel 'all'"):
        tiledseg.segment(picture, channel="all")


def test_a_function_that_cannot_travel_is_refused_before_any_work(
    image_path: Path, tmp_path: Path, client: Any
) -> None:
    import threading

    lock = threading.Lock()

    def locked(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        with lock:
            return above(pixels)

    with pytest.raises(SettingsError, match=r"locked cannot be sent to workers \(TypeError: .*lock"):
        tiledseg.segment(image_path, tmp_path / "out.zarr", segmenter=locked, halo=HALO, client=client)
    assert [path.name for path in tmp_path.iterdir()] == [image_path.name]
    assert labels_by(locked, image_path).max() > 0, "in this process it may hold anything"


def test_a_missing_chunk_stops_a_function_too(image_path: Path, whole: npt.NDArray[np.uint32]) -> None:
    (image_path / "0" / "c" / "1" / "1").unlink()
    with pytest.raises(ImageError, match=r"chunk 0/c/1/1 of .* is missing"):
        tiledseg.segment(image_path, segmenter=above, halo=HALO, block=150)
    filled = labels_by(above, image_path, block=150, missing_chunks="fill")
    assert 0 < np.unique(filled).size < np.unique(whole).size


class Threshold:
    """A callable object."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        return above(pixels, self.value)

    def find(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        return above(pixels, self.value)


def closure(value: Any) -> Callable[..., Any]:
    return lambda pixels: above(pixels, value)


def test_functions_that_differ_are_told_apart() -> None:
    different: list[Callable[[], Any]] = [
        lambda: above,
        lambda: in_raster_order,
        lambda: functools.partial(above, threshold=1),
        lambda: functools.partial(above, threshold=2),
        lambda: functools.partial(above, 2),
        lambda: closure(1),
        lambda: closure(2),
        lambda: closure("2"),
        lambda: closure(np.arange(3)),
        lambda: closure(np.arange(3.0)),
        lambda: closure({"a": [1, (2, None)], "b": {1, 2}}),
        lambda: closure({"a": [1, (2, None)], "b": {1, 3}}),
        lambda: closure(above),
        lambda: closure(closure(3)),
        lambda: Threshold(1),
        lambda: Threshold(2),
        lambda: Threshold(1).find,
        lambda: Threshold(2).find,
        lambda: functools.lru_cache(above),
        lambda: np.add,
        lambda: np.square,
        lambda: len,
        lambda: lambda pixels: pixels + 1,
        lambda: lambda pixels: pixels + 2,
    ]
    names = [f"{name_of(make())} {identity_of(make())}" for make in different]
    assert len(set(names)) == len(names)
    assert names == [f"{name_of(make())} {identity_of(make())}" for make in different]
    assert name_of(functools.partial(above)) == f"partial({__name__}.above)"
    assert name_of(Threshold(1)) == f"{__name__}.Threshold"


def test_an_identity_is_the_same_in_every_process() -> None:
    """Also of a set, whose order changes with every process, and where there is no source to read."""
    program = (
        "import sys; from tiledseg.segmenters import identity_of\n"
        "names = {'a', 'b', 'c', 'd'}\n"
        "def make(names):\n"
        "    def f(pixels): return pixels if pixels in {'x', 'y', 'z'} else names\n"
        "    return f\n"
        "print(identity_of(make(names)))"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(3)]
    assert [run.stderr for run in runs] == [""] * 3
    assert len({run.stdout for run in runs}) == 1


def test_a_function_that_refers_to_itself_has_an_identity() -> None:
    def recursive(pixels: Any) -> Any:
        return recursive(pixels)

    assert identity_of(recursive) == identity_of(recursive)


def test_the_example_of_the_docstring_works(slide: Any, tmp_path: Path) -> None:
    lines = [line.strip() for line in (tiledseg.segment.__doc__ or "").splitlines()]
    code = "\n".join(line[4:] for line in lines if line.startswith(("... ", ">>> def")))
    space: dict[str, Any] = {"__name__": "example"}
    exec(code, space)
    write_image(tmp_path / "slide.ome.zarr", slide[0], axes="yx")
    found = tiledseg.segment(tmp_path / "slide.ome.zarr", segmenter=space["nuclei"], diameter=30)
    assert found.report.segmenter == "example.nuclei"
    assert found.report.n_objects > 80
    stored = zarr.open_array(tmp_path / "slide.ome.zarr" / "labels" / "cells" / "0", mode="r")
    assert stored[:].max() == found.report.n_objects
