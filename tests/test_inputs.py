"""What the network is shown: channels by name, index and Cellpose's numbers, combined, unmixed, inverted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import tiledseg
from tiledseg.config import SurveyConfig
from tiledseg.errors import ImageError, SettingsError
from tiledseg.images import Image, open_image
from tiledseg.inputs import Input, channels_of, inputs_of, inputs_text
from tiledseg.networks.models import KNOWN_MODELS
from tiledseg.omezarr import write_image

from .conftest import Slide

NAMES = ["DAPI", "actin", "tubulin, beta"]
ALL = np.s_[0:30, 0:40]


@pytest.fixture
def pixels() -> npt.NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, 5000, (3, 30, 40)).astype(np.uint16)


@pytest.fixture
def image(pixels: npt.NDArray[np.uint16], tmp_path: Path) -> Image:
    write_image(tmp_path / "cells.ome.zarr", pixels, axes="cyx", channels=NAMES)
    return open_image(tmp_path / "cells.ome.zarr")


def shown(image: Image, n_inputs: int = 2, **settings: Any) -> tuple[Input, ...]:
    return inputs_of(image, SurveyConfig(**settings), n_inputs, "model m")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [((0,), "")]),
        ({"channel": "actin"}, [((1,), "")]),
        ({"channel": 2}, [((2,), "")]),
        ({"channel": "tubulin, beta"}, [((2,), "")]),
        ({"channel": "actin", "nuclear_channel": "DAPI"}, [((1,), ""), ((0,), "")]),
        ({"channel": "actin,0"}, [((1, 0), "max")]),
        ({"channel": ["actin", "tubulin, beta"], "combine": "mean"}, [((1, 2), "mean")]),
        ({"channel": "grey"}, [((0, 1, 2), "mean")]),
        ({"channel": "green", "nuclear_channel": "blue"}, [((1,), ""), ((2,), "")]),
        ({"chan": 0}, [((0, 1, 2), "mean")]),
        ({"chan": 2, "chan2": 1}, [((1,), ""), ((0,), "")]),
        ({"chan": "3"}, [((2,), "")]),
        ({"stain": "hematoxylin"}, [((0, 1, 2), "hematoxylin")]),
        ({"stain": "dab", "channel": "2,1,0"}, [((2, 1, 0), "dab")]),
    ],
)
def test_channels_are_found(image: Image, settings: dict[str, Any], expected: list[Any]) -> None:
    found = shown(image, **settings)
    assert [(single.channels, single.how) for single in found] == expected


def test_a_network_of_three_inputs_is_shown_the_first_three_channels(image: Image) -> None:
    assert [single.channels for single in shown(image, 3)] == [(0,), (1,), (2,)]
    assert [single.channels for single in shown(image, 3, channel=1, nuclear_channel=0)] == [(1,), (0,)]
    assert [single.channels for single in shown(open_image(np.zeros((9, 9), np.uint8)), 3)] == [(0,)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channel": "gfp"}, "has no channel 'gfp'"),
        ({"channel": "actin,7"}, "has no channel '7'"),
        ({"chan": 4}, "has 3 channels, so there is no chan 4"),
        ({"stain": "eosin", "channel": "0,1"}, "unmixed from red, green and blue"),
    ],
)
def test_what_the_image_does_not_have_is_refused(image: Image, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ImageError, SettingsError), match=message):
        shown(image, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nuclear_channel": 1}, "model m takes a single channel"),
        ({"chan": 1, "chan2": 2}, "model m takes a single channel"),
    ],
)
def test_a_network_without_a_nuclear_channel_refuses_one(image: Image, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        shown(image, 1, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chan2": 1}, "chan2 counts beside chan"),
        ({"chan": 1, "channel": 1}, "chan takes the place of channel"),
        ({"chan": 0, "chan2": 1}, "chan 0 is the mean of all channels"),
        ({"chan": "red"}, "chan must be a whole number"),
        ({"combine": "sum"}, "combine must be max or mean"),
        ({"stain": "giemsa"}, "stain must be none or hematoxylin"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SurveyConfig(**settings)


def test_pixels_are_those_of_the_channels(image: Image, pixels: npt.NDArray[np.uint16]) -> None:
    assert np.array_equal(Input((1,)).read(image, 0, ALL), pixels[1])
    assert Input((1,)).read(image, 0, ALL).dtype == np.uint16
    largest = Input((2, 0, 1), "max").read(image, 0, ALL)
    assert largest.dtype == np.float32
    assert np.array_equal(largest, pixels.max(axis=0))
    np.testing.assert_allclose(Input((0, 2), "mean").read(image, 0, ALL), pixels[[0, 2]].mean(axis=0), rtol=1e-6)
    part = Input((0, 1), "max").read(image, 0, np.s_[5:9, 30:40])
    assert np.array_equal(part, pixels[:2, 5:9, 30:40].max(axis=0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("stain", "number"), [("hematoxylin", 0), ("eosin", 1), ("dab", 2)])
def test_a_stain_is_unmixed_as_scikit_image_does(dtype: Any, stain: str, number: int) -> None:
    from skimage.color import rgb2hed

    colours = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (600, 50, 3)).astype(dtype)
    image = open_image(np.moveaxis(colours, -1, 0), axes="cyx")
    found = inputs_of(image, SurveyConfig(stain=stain), 1, "model m")[0].read(image, 0, np.s_[0:600, 0:50])
    np.testing.assert_allclose(found, rgb2hed(colours)[..., number], atol=1e-6)
    assert found.max() > 0.05


def test_a_stain_of_floating_point_colours_is_refused() -> None:
    image = open_image(np.zeros((3, 20, 20), np.float32), axes="cyx")
    with pytest.raises(SettingsError, match="store the colours as uint8 or uint16"):
        inputs_of(image, SurveyConfig(stain="hematoxylin"), 1, "model m")


def test_inputs_are_told_in_words(image: Image) -> None:
    found = shown(image, channel="actin,DAPI", nuclear_channel="DAPI")
    assert inputs_text(image, found) == "max of actin, DAPI; DAPI"
    assert channels_of(found) == (0, 1)


def labels_of(image: Any, **settings: Any) -> npt.NDArray[np.uint32]:
    labels: npt.NDArray[np.uint32] = tiledseg.segment(
        image, **{"diameter": 24.0, "axes": "cyx", **settings}
    ).labels.compute()
    return labels


def test_the_channel_that_is_named_is_segmented(slide: Slide) -> None:
    picture = slide[0][:300, :300]
    noise = np.random.default_rng(2).poisson(100, picture.shape).astype(np.uint16)
    alone = tiledseg.segment(picture, diameter=24.0).labels.compute()
    assert np.array_equal(labels_of(np.stack([noise, picture]), channel=1), alone)


def test_two_channels_that_show_half_of_the_cells_each_show_all_combined(slide: Slide) -> None:
    """Cells of even and odd numbers lie in different channels, as with two antibodies."""
    picture, truth = (part[:400, :400] for part in slide)
    background = np.uint16(np.median(picture[truth == 0]))
    halves = np.stack([np.where((truth % 2 == k) & (truth > 0), picture, background) for k in (0, 1)])
    both = tiledseg.compare(labels_of(halves, channel="0,1"), truth).overall
    one = tiledseg.compare(labels_of(halves, channel=0), truth).overall
    assert both.ap[0] > 0.9
    assert one.ap[0] < 0.6


@pytest.fixture
def doubled(tmp_path: Path) -> str:
    """A file with the weights of the default model, in which the second input counts as the first does."""
    state = torch.load(KNOWN_MODELS["tiledseg-nuclei"].path, weights_only=True)
    for key, values in state.items():
        if key.startswith(("downsample.down.res_down_0.conv.conv_0.", "downsample.down.res_down_0.proj.")):
            if values.shape == (2,):
                values[1] = values[0]
            elif values.ndim == 4:
                values[:, 1] = values[:, 0]
    torch.save(state, tmp_path / "doubled")
    return str(tmp_path / "doubled")


def test_a_nuclear_channel_is_seen_by_a_network_that_has_one(slide: Slide, doubled: str) -> None:
    picture, truth = (part[:300, :300] for part in slide)
    flat = np.random.default_rng(0).poisson(100, picture.shape).astype(np.uint16)
    both = np.stack([flat, picture])
    seen = tiledseg.compare(labels_of(both, channel=0, nuclear_channel=1, model=doubled), truth).overall
    unseen = tiledseg.compare(labels_of(both, channel=0, model=doubled), truth).overall
    assert seen.ap[0] > 0.8
    assert unseen.ap[0] < 0.1


def test_the_negative_of_a_picture_inverted_gives_the_same_cells(slide: Slide) -> None:
    picture = slide[0][:300, :300]
    negative = np.uint16(65535) - picture
    for settings in ({}, {"normalize": "local"}):
        positive = tiledseg.segment(picture, diameter=24.0, **settings).labels.compute()
        inverted = tiledseg.segment(negative, diameter=24.0, invert=True, **settings).labels.compute()
        assert tiledseg.compare(inverted, positive).overall.ap[2] > 0.97


def test_inputs_of_several_channels_do_not_depend_on_blocks_or_workers(
    slide: Slide, tmp_path: Path, client: Any
) -> None:
    picture = np.stack([slide[0], slide[0][::-1], slide[0][:, ::-1]])[:, :400, :400]
    write_image(tmp_path / "cells.ome.zarr", picture, axes="cyx", channels=NAMES, n_levels=2)
    for settings in (
        {"channel": "DAPI,actin", "combine": "mean", "invert": True, "normalize": "local"},
        {"stain": "hematoxylin"},
    ):
        whole, blocks = (
            tiledseg.segment(
                tmp_path / "cells.ome.zarr",
                tmp_path / f"{settings.get('stain')}-{block}",
                client=on,
                block=block,
                diameter=24.0,
                **settings,
            )
            for block, on in ((2048, None), (130, client))
        )
        assert np.array_equal(whole.labels.compute(), blocks.labels.compute())
        assert whole.report.percentiles == blocks.report.percentiles


def test_a_run_with_other_channels_is_refused(slide: Slide, tmp_path: Path) -> None:
    write_image(tmp_path / "cells.ome.zarr", np.stack([slide[0][:200, :200]] * 3), axes="cyx", channels=NAMES)
    first, again = (
        tiledseg.segment(tmp_path / "cells.ome.zarr", diameter=24.0, channel=["DAPI", "actin"]) for _ in range(2)
    )
    assert again.report.kept["flows"] == first.report.computed["flows"]
    with pytest.raises(SettingsError, match="channel was"):
        tiledseg.segment(tmp_path / "cells.ome.zarr", diameter=24.0, channel="DAPI")


def test_a_function_is_given_channels_combined(pixels: npt.NDArray[np.uint16]) -> None:
    """A function that copies what it is given into labels shows what that was."""
    image = pixels // 2 * 2
    found = tiledseg.segment(
        image, axes="cyx", segmenter=lambda seen: seen.astype(np.uint32), channel="0,2", combine="max", halo=0
    )
    expected = image[[0, 2]].max(axis=0)
    labels = found.labels.compute()
    # Labels are numbered anew: each stands for one value, and each value has one.
    pairs = np.unique(np.stack([labels.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == np.unique(labels).size == np.unique(expected).size
