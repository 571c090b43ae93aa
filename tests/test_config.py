"""Settings: one source for command line and Python, checked on construction."""

from __future__ import annotations

import argparse

import pytest

from tiledseg.cli.parser import make_parser
from tiledseg.config import Settings, SurveyConfig
from tiledseg.errors import SettingsError

BAD = {
    "diameter": ["0", "-3", "nan", "wide", "inf", "12furlongs", 0, -1.0, ""],
    "foreground": ["on"],
    "normalize": ["tile"],
    "missing_chunks": ["ignore"],
    "device": ["tpu"],
    "block": [0, 15, "big", 3.5, True],
    "halo": [-1, "wide"],
    "level": [-1, 1.5, "coarse"],
    "anisotropy": [0, "thick", -1],
    "stitch_threshold": [-0.1, 1.5, "half"],
    "stitch_gap": [2, -1, "one"],
    "flow3d_smooth": [-1, "much"],
    "flow_threshold": [-0.1, "x", float("nan")],
    "cellprob_threshold": ["x", float("inf"), -9],
    "min_size": [-1, 2.5],
    "niter": [0, "x"],
    "name": ["", "a/b", ".hidden", "a b", ".."],
    "ome_zarr": ["0.3"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match="label name" if name == "name" else name):
        Settings.of(**{name: value})


def test_unknown_settings_are_refused_with_a_hint() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting 'diametre'; did you mean 'diameter'\?"):
        Settings.of(diametre=12)


@pytest.mark.parametrize(
    ("given", "pixels"),
    [("auto", None), (12, 12.0), ("12", 12.0), ("12px", 12.0), ("6um", 12.0), ("6 µm", 12.0)],
)
def test_diameters_in_pixels_and_micrometres(given: object, pixels: float | None) -> None:
    assert SurveyConfig(diameter=given).diameter_px((0.5, 0.5)) == pixels  # type: ignore[arg-type]


def test_micrometres_need_a_pixel_size() -> None:
    with pytest.raises(SettingsError, match="does not say its pixel size; give the diameter in pixels"):
        SurveyConfig(diameter="12um").diameter_px(None)


def test_a_block_smaller_than_its_halo_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"block 64 is smaller than the halo 100; .*--block 100"):
        Settings.of(block=64, halo=100)


def test_the_command_line_has_every_setting() -> None:
    parser = make_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    segment = commands.choices["segment"]
    given = vars(segment.parse_args(["image"]))
    flags = {action.dest: action for action in segment._actions}
    for name, default in Settings().flat().items():
        assert name in flags
        assert name not in given, f"{name} would override the default of the settings"
        kind = flags[name].type
        if default is not None and kind is not None:
            assert kind(str(default)) == default
