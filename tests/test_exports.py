"""A finished result in other forms: outlines that give back the labels, tables that other programs open."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pyarrow.csv
import pyarrow.parquet
import pytest
import shapely
import shapely.geometry
import zarr
from scipy import ndimage

import tiledseg
from tiledseg import exports, table
from tiledseg.cli import main
from tiledseg.errors import ImageError, OutputError, SettingsError
from tiledseg.exports import export, polygons
from tiledseg.omezarr import write_image

from .results import Labels, as_drawn, drawn_labels, published, small_regions

SHAPE = (150, 170)


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result in many small regions, with pixels of 0.5 µm."""
    small_regions(monkeypatch)
    other = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.uint16)
    published(tmp_path, drawn_labels(SHAPE), "yx", others=(other,), spacing_um=(0.5, 0.5))
    return tmp_path / "out.ome.zarr"


def labels_of(result: Path) -> Labels:
    found: Labels = zarr.open_array(result / "labels/cells/0", mode="r")[...]
    return found


def table_of(result: Path) -> Any:
    return pyarrow.parquet.ParquetFile(result / "tables/cells/table.parquet").read()


def filled(shapes: list[Any], ids: list[int], shape: tuple[int, ...]) -> Labels:
    """Pixels whose centre is inside each shape."""
    labels = np.zeros(shape, np.uint32)
    for geometry, label in zip(shapes, ids, strict=True):
        left, top, right, bottom = map(int, geometry.bounds)
        y, x = np.mgrid[top:bottom, left:right]
        inside = shapely.contains_xy(geometry, x + 0.5, y + 0.5)
        assert not labels[top:bottom, left:right][inside].any()
        labels[top:bottom, left:right][inside] = label
    return labels


# ---- outlines ------------------------------------------------------------------------------------


def test_geojson_is_what_qupath_reads_and_gives_back_the_labels(result: Path, tmp_path: Path) -> None:
    export(result, {"geojson": tmp_path / "a.geojson"})
    document = json.loads((tmp_path / "a.geojson").read_text())
    rows = {row["label"]: row for row in table_of(result).to_pylist()}
    assert document["type"] == "FeatureCollection"
    assert len(document["features"]) == len(rows) > 20
    kinds, shapes, ids = set(), [], []
    for feature in document["features"]:
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "detection"
        label = int(feature["properties"]["name"])
        row = rows[label]
        assert feature["properties"]["measurements"] == {k: v for k, v in row.items() if not k.startswith("bbox_")}
        geometry = shapely.geometry.shape(feature["geometry"])
        assert shapely.is_valid(geometry)
        assert geometry.area == row["area"]
        assert geometry.bounds == (row["bbox_x_start"], row["bbox_y_start"], row["bbox_x_stop"], row["bbox_y_stop"])
        assert "plane" not in feature["geometry"]
        for part in shapely.get_parts(geometry):
            assert shapely.is_ccw(part.exterior)
            assert not any(shapely.is_ccw(ring) for ring in part.interiors)
        kinds.add((feature["geometry"]["type"], sum(len(part.interiors) for part in shapely.get_parts(geometry)) > 0))
        shapes.append(geometry)
        ids.append(label)
    assert len(kinds) == 4
    np.testing.assert_array_equal(filled(shapes, ids, SHAPE), labels_of(result))
    assert (tmp_path / "a.geojson").read_text().count("\n") == len(rows) + 2


def test_outlines_do_not_depend_on_regions(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for region in (16, 48, 2048):
        monkeypatch.setattr("tiledseg.regions.REGION", region)
        export(result, {"geojson": tmp_path / f"{region}.geojson"})
        features = json.loads((tmp_path / f"{region}.geojson").read_text())["features"]
        found.append(sorted(features, key=lambda feature: int(feature["properties"]["name"])))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("part", [{"region": "t=1,y=8:120,x=16:"}, {"level": 1}, {"region": "y=8:,x=16:", "level": 1}])
def test_geojson_of_a_part_lies_in_the_full_image(tmp_path: Path, part: dict[str, Any]) -> None:
    squares = {(28, 20, 40, 36), (60, 64, 64, 96), (100, 100, 112, 128)}
    image = np.zeros((2, 128, 128), np.uint8)
    for top, left, bottom, right in squares:
        image[1, top:bottom, left:right] = 200
    write_image(tmp_path / "image.ome.zarr", image, axes="tyx", n_levels=2)
    out = tmp_path / "out.ome.zarr"
    with_outlines = {"polygons": "geojson", "csv": True, "halo": 0, **part}
    found = tiledseg.segment(tmp_path / "image.ome.zarr", out, segmenter=bright, **with_outlines)
    export(out, {"geojson": tmp_path / "later.geojson"})
    assert (tmp_path / "later.geojson").read_text() == Path(found.exports["geojson"]).read_text()
    features = json.loads((tmp_path / "later.geojson").read_text())["features"]
    bounds = {shapely.geometry.shape(feature["geometry"]).bounds for feature in features}
    assert bounds == {(left, top, right, bottom) for top, left, bottom, right in squares}
    assert {feature["geometry"]["plane"]["t"] for feature in features} == {1}


def test_labels_that_do_not_say_what_they_cover(result: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export(result, {"geojson": tmp_path / "a.geojson"})
    assert not caplog.records
    group = zarr.open_group(result / "labels/cells")
    told = dict(group.attrs["tiledseg"])  # type: ignore[call-overload]
    for placement in (None, [[0, 1]], [["a", 1], [0, 1]], 3):
        group.attrs["tiledseg"] = {**told, "placement": placement}
        caplog.clear()
        export(result, {"geojson": tmp_path / "b.geojson"})
        assert "'cells' do not say which part of the image they cover" in caplog.text
        assert (tmp_path / "b.geojson").read_text() == (tmp_path / "a.geojson").read_text()


def bright(pixels: npt.NDArray[Any]) -> Labels:
    """A segmenter for bright shapes on black."""
    found: Labels = ndimage.label(pixels > 100)[0].astype(np.uint32)
    return found


def test_geoparquet_has_the_table_and_the_labels(result: Path, tmp_path: Path) -> None:
    export(result, {"geoparquet": tmp_path / "a.parquet"})
    file = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet")
    about = json.loads(file.schema_arrow.metadata[b"geo"])
    assert (about["version"], about["primary_column"]) == ("1.0.0", "geometry")
    assert about["columns"]["geometry"]["encoding"] == "WKB"
    assert not file.schema_arrow.field("geometry").nullable
    rows = file.read().sort_by("label")
    shapes = shapely.from_wkb(rows["geometry"].to_numpy(zero_copy_only=False))
    assert shapely.is_valid(shapes).all()
    assert {kind.geom_type for kind in shapes} == set(about["columns"]["geometry"]["geometry_types"])
    np.testing.assert_array_equal(filled(list(shapes), rows["label"].to_pylist(), SHAPE), labels_of(result))
    assert rows.drop(["geometry"]).equals(table_of(result))


@pytest.mark.parametrize("axes", ["tyx", "zyx"])
def test_outlines_say_their_time_point_and_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axes: str) -> None:
    small_regions(monkeypatch)
    settings: dict[str, Any] = {"stitch_threshold": 0} if axes == "zyx" else {}
    published(tmp_path, drawn_labels((3, 60, 70)), axes, polygons="geojson", csv=True, **settings)
    folder = tmp_path / "out.ome.zarr/tables/cells"
    again = np.zeros((3, 60, 70), np.uint32)
    for feature in json.loads((folder / "polygons.geojson").read_text())["features"]:
        plane = feature["geometry"]["plane"]
        assert plane["c"] == -1
        at, other = (plane["t"], plane["z"]) if axes == "tyx" else (plane["z"], plane["t"])
        assert other == 0
        again[at] += filled(
            [shapely.geometry.shape(feature["geometry"])], [int(feature["properties"]["name"])], (60, 70)
        )
    np.testing.assert_array_equal(again, labels_of(tmp_path / "out.ome.zarr"))
    assert pyarrow.csv.read_csv(folder / "table.csv").num_rows == again.max()


def test_objects_that_extend_over_planes_have_no_outlines(tmp_path: Path) -> None:
    volume = drawn_labels((4, 30, 40))
    with pytest.raises(OutputError, match=r"outlines in a plane, and the objects of 'cells' extend over planes"):
        published(tmp_path, volume, "zyx", do_3d=True, polygons="geojson")
    assert not (tmp_path / "out.ome.zarr").exists()
    published(tmp_path, volume, "zyx", do_3d=True)
    with pytest.raises(OutputError, match=r"outlines in a plane"):
        export(tmp_path / "out.ome.zarr", {"geojson": tmp_path / "a.geojson"})
    assert not (tmp_path / "a.geojson").exists()


def test_an_object_too_large_to_outline(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "LARGEST_BOX", 10)
    with pytest.raises(OutputError, match=r"the box of object \d+ has more than 10 pixels.*--max-size"):
        export(result, {"geojson": tmp_path / "a.geojson"})


@pytest.mark.parametrize("form", ["geojson", "geoparquet"])
def test_outlines_of_a_region_are_let_go_when_the_next_is_written(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    written: list[list[weakref.ref[npt.NDArray[Any]]]] = []
    still_held = []

    def watched(result: Any) -> Iterator[tuple[Any, list[polygons.MultiPolygon]]]:
        for rows, shapes in polygons.polygons_of(result):
            still_held.append(sum(ring() is not None for region in written[:-1] for ring in region))
            written.append([weakref.ref(ring) for shape in shapes for polygon in shape for ring in polygon])
            yield rows, shapes

    monkeypatch.setattr(importlib.import_module(f"tiledseg.exports.{form}"), "polygons_of", watched)
    export(result, {form: tmp_path / f"a.{form}"})
    assert len(written) > 5
    assert all(written)
    assert set(still_held) == {0}


# ---- tables --------------------------------------------------------------------------------------


def test_csv_is_the_table(result: Path, tmp_path: Path) -> None:
    export(result, {"csv": tmp_path / "a.csv"})
    rows, expected = pyarrow.csv.read_csv(tmp_path / "a.csv"), table_of(result)
    assert rows.column_names == expected.column_names
    for name in rows.column_names:
        np.testing.assert_allclose(rows[name].to_numpy(), expected[name].to_numpy(), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("batch", [7, 2**18])
def test_anndata_opens_with_its_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    small_regions(monkeypatch)
    monkeypatch.setattr(table, "TABLE_BATCH", batch)
    published(tmp_path, drawn_labels(SHAPE), "yx", spacing_um=(0.5, 0.5), features=True)
    export(tmp_path / "out.ome.zarr", {"anndata": tmp_path / "a.zarr"})
    expected = table_of(tmp_path / "out.ome.zarr").to_pandas()
    found = anndata.read_zarr(tmp_path / "a.zarr")
    assert found.obs["region"].dtype == "category"
    assert set(found.obs["region"]) == {"cells"}
    assert list(found.obs["label"]) == list(expected.label)
    assert list(found.obs_names) == [str(label) for label in expected.label]
    np.testing.assert_array_equal(found.obsm["spatial"], expected[["centroid_x", "centroid_y"]])
    assert {"area", "area_um2", "mean_drawn", "solidity"} < set(found.var_names)
    for name in found.var_names:
        np.testing.assert_array_equal(found[:, name].X[:, 0], expected[name].astype(np.float32), err_msg=name)
    kept = {"label", "centroid_x", "centroid_y"} | {name for name in expected if name.startswith("bbox_")}
    assert set(expected) - kept == {*found.var_names, "centroid_x_um", "centroid_y_um"}
    assert found.uns["spatialdata_attrs"] == {"region": "cells", "region_key": "region", "instance_key": "label"}


def test_a_result_without_objects(tmp_path: Path) -> None:
    published(tmp_path, np.zeros((40, 50), np.uint32), "yx")
    targets = {kind: tmp_path / f"empty.{kind}" for kind in exports.WRITERS}
    export(tmp_path / "out.ome.zarr", targets)
    assert json.loads(targets["geojson"].read_text()) == {"type": "FeatureCollection", "features": []}
    assert pyarrow.parquet.ParquetFile(targets["geoparquet"]).metadata.num_rows == 0
    assert targets["csv"].read_text().count("\n") == 1
    assert anndata.read_zarr(targets["anndata"]).n_obs == 0


OPEN_SPATIALDATA = """
import json, sys, warnings
warnings.simplefilter("ignore")
import spatialdata
data = spatialdata.read_zarr(sys.argv[1])
labels, table = data["cells"], data["cells_table"]
levels = [labels[name].image for name in labels] if hasattr(labels, "children") else [labels]
joined = spatialdata.join_spatialelement_table(data, spatial_element_names="cells", table_name="cells_table")[1]
print(json.dumps({
    "shapes": [level.shape for level in levels],
    "total": int(levels[0].values.astype("u8").sum()),
    "n": table.n_obs,
    "joined": joined.n_obs,
    "systems": sorted(spatialdata.transformations.get_transformation(labels, get_all=True)),
    "micrometer": spatialdata.transformations.get_transformation(labels, "micrometer").to_affine_matrix(
        ("y", "x"), ("y", "x")).tolist(),
}))
"""


def test_spatialdata_opens_with_its_own_package(result: Path, tmp_path: Path) -> None:
    """In a Python of its own, TILEDSEG_SPATIALDATA_PYTHON, for the package wants another Dask than we do."""
    python = os.environ.get("TILEDSEG_SPATIALDATA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import spatialdata"], capture_output=True).returncode:
        pytest.skip("spatialdata is not installed; TILEDSEG_SPATIALDATA_PYTHON may name a Python that has it")
    export(result, {"spatialdata": tmp_path / "a.zarr"})
    command = [python, "-c", OPEN_SPATIALDATA, str(tmp_path / "a.zarr")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    found, labels = json.loads(shown.stdout.splitlines()[-1]), labels_of(result)
    assert found["shapes"][0] == list(labels.shape)
    assert len(found["shapes"]) > 2
    assert found["total"] == labels.sum(dtype=np.uint64)
    assert found["n"] == found["joined"] == labels.max()
    assert found["systems"] == ["global", "micrometer"]
    assert found["micrometer"] == [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]]


def test_spatialdata_as_it_is_stored(result: Path, tmp_path: Path) -> None:
    export(result, {"spatialdata": tmp_path / "a.zarr"})
    root = zarr.open_group(tmp_path / "a.zarr", mode="r")
    np.testing.assert_array_equal(root["labels/cells/0"][...], labels_of(result))
    np.testing.assert_array_equal(root["labels/cells/1"][...], labels_of(result)[::2, ::2])
    attributes = root["tables/cells_table"].attrs
    assert (attributes["region"], attributes["instance_key"]) == ("cells", "label")
    assert anndata.read_zarr(tmp_path / "a.zarr/tables/cells_table").n_obs == labels_of(result).max()


def test_spatialdata_has_no_time(tmp_path: Path) -> None:
    published(tmp_path, drawn_labels((2, 30, 40)), "tyx")
    with pytest.raises(OutputError, match=r"'cells' have a time axis, which SpatialData does not know; take --anndata"):
        export(tmp_path / "out.ome.zarr", {"spatialdata": tmp_path / "a.zarr"})
    assert not (tmp_path / "a.zarr").exists()


# ---- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["geojson", "geoparquet", "mine.geojson", "mine.parquet"])
def test_segment_writes_the_same_as_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    small_regions(monkeypatch)
    monkeypatch.chdir(tmp_path)
    published(tmp_path, drawn_labels((60, 70)), "yx", polygons=wanted, csv=True)
    out = tmp_path / "out.ome.zarr"
    kind = "geojson" if wanted.endswith("geojson") else "geoparquet"
    beside = {"geojson": "polygons.geojson", "geoparquet": "polygons.parquet"}.get(wanted)
    written = out / "tables/cells" / beside if beside else tmp_path / wanted
    export(out, {kind: tmp_path / "again", "csv": tmp_path / "a.csv"})
    assert written.read_bytes() == (tmp_path / "again").read_bytes()
    assert (out / "tables/cells/table.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_outlines_can_be_asked_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_regions(monkeypatch)
    published(tmp_path, drawn_labels((60, 70)), "yx")
    again = published(tmp_path, drawn_labels((60, 70)), "yx", polygons="geojson")
    assert again.report.computed.get("publish", 0) == 0
    assert (tmp_path / "out.ome.zarr/tables/cells/polygons.geojson").is_file()


def test_labels_may_be_stored_in_another_way_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_regions(monkeypatch)
    first = published(tmp_path, drawn_labels(SHAPE), "yx")
    labels, rows = first.labels.compute(), first.table
    second = published(tmp_path, drawn_labels(SHAPE), "yx", shard=True)
    assert second.report.computed.get("masks", 0) == 0
    assert zarr.open_array(tmp_path / "out.ome.zarr/labels/cells/0", mode="r").shards == (64, 64)
    np.testing.assert_array_equal(second.labels.compute(), labels)
    assert second.table.equals(rows)


@pytest.mark.parametrize("region", [8, 16, 32, 64])
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("shape", [(61, 77), (9, 37, 50)])
def test_every_id_of_a_level_is_that_of_the_level_below_at_that_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], shard: bool, region: int
) -> None:
    """Levels are written with the one before, two or three at a time or each by itself, as regions and files allow."""
    small_regions(monkeypatch, region, 8)
    published(tmp_path, drawn_labels(shape), "zyx"[-len(shape) :], do_3d=len(shape) == 3, shard=shard)
    group = zarr.open_group(tmp_path / "out.ome.zarr/labels/cells", mode="r")
    levels = [group[str(i)][...] for i in range(len(list(group.array_keys())))]
    assert len(levels) > 3
    for below, above in itertools.pairwise(levels):
        steps = [-(-n // m) for n, m in zip(below.shape, above.shape, strict=True)]
        assert set(steps) == {1, 2} or set(steps) == {2}
        np.testing.assert_array_equal(above, below[tuple(slice(None, None, step) for step in steps)])


def test_wishes_that_cannot_be_met(tmp_path: Path) -> None:
    picture = drawn_labels((30, 40))
    for name, value in (("shard", True), ("csv", True), ("polygons", "geojson")):
        with pytest.raises(SettingsError, match=f"{name} is about files, and labels of an array stay in memory"):
            tiledseg.segment(picture, segmenter=as_drawn, halo=0, **{name: value})
    with pytest.raises(SettingsError, match=r"polygons must be 'geojson', 'geoparquet', or a file that ends in"):
        tiledseg.segment(picture, segmenter=as_drawn, halo=0, polygons="shp")
    write_image(tmp_path / "old.ome.zarr", picture, axes="yx", version="0.4")
    with pytest.raises(SettingsError, match=r"has no shards; leave out --shard"):
        tiledseg.segment(tmp_path / "old.ome.zarr", segmenter=as_drawn, halo=0, shard=True)


def test_nothing_to_export(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = {"csv": tmp_path / "a.csv"}
    with pytest.raises(ImageError, match=r"nowhere\.zarr holds no finished labels; run segment first"):
        export(tmp_path / "nowhere.zarr", place)
    with pytest.raises(ImageError, match=r"holds no finished labels 'nuclei'"):
        export(result, place, "nuclei")
    for listed, said in (
        (
            ["cells", "../../image.ome.zarr"],
            r"names the labels '../../image\.ome\.zarr', which are not inside it; refused",
        ),
        (["cells", "others"], r"holds labels cells, others; say which with --name"),
    ):
        zarr.open_group(result / "labels").attrs["ome"] = {"labels": listed, "version": "0.5"}
        with pytest.raises(ImageError, match=said):
            export(result, place)
    file = result / "tables/cells/table.parquet"
    shutil.copy(file, tmp_path / "kept")
    pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), file)
    with pytest.raises(OutputError, match=r"table\.parquet has no column '.*'; run segment again"):
        export(result, place, "cells")
    file.write_bytes(b"no table")
    with pytest.raises(OutputError, match=r"table\.parquet cannot be read"):
        export(result, place, "cells")
    file.unlink()
    with pytest.raises(ImageError, match=r"table\.parquet is missing; run segment again"):
        export(result / "labels/cells", place)
    shutil.copy(tmp_path / "kept", file)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match=r"there is there already; give another place \(--anndata\)"):
        export(result, {"anndata": tmp_path / "there"}, "cells")
    assert main(["export", str(result)]) == 2
    assert "nothing to write; give one or more of --geojson, --geoparquet, --csv" in capsys.readouterr().err
    assert not place["csv"].exists()


def test_the_command_line(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets: dict[str, npt.NDArray[Any] | Path] = {kind: tmp_path / kind for kind in exports.WRITERS}
    flags = [word for kind, place in targets.items() for word in (f"--{kind}", str(place))]
    assert main(["export", str(result), *flags]) == 0
    shown = capsys.readouterr().out
    assert all(f"{kind:<12} {place}" in shown for kind, place in targets.items())
    assert all(place.exists() for place in targets.values() if isinstance(place, Path))
