"""A module imports only from rows above its own; each framework has one home."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tiledseg"

ROWS = [
    {"addresses", "bars", "displayed", "ending", "errors", "meters", "waiting", "images.units"},
    {"disk", "images.damage", "images.display", "images.recent"},
    {"folders", "lock"},
    {
        "axes",
        "claims",
        "chunks",
        "cores",
        "shapes",
        "tls",
        "fields",
        "foreground",
        "hulls",
        "lerp",
        "pool",
        "overlaps",
        "networks.fetch",
        "networks.fused",
        "networks.size",
        "networks.states",
    },
    {
        "blend",
        "machine",
        "objects",
        "particles",
        "networks.unet",
        "networks.attention",
        "patience",
        "urls",
    },
    {"malloc"},
    {"clients", "heat", "networks.cpsam", "remote_clients"},
    {"batch.config"},
    {"batch.systems"},
    {"gpu", "batch.scripts", "remote"},
    {"batch.scheduler"},
    {"zarr_stores"},
    {
        "batch.supervisor",
        "config",
        "grid",
        "dynamics",
        "seams",
        "progress",
        "slides",
        "volumes",
        "scoring",
        "pictures",
        "canvas",
    },
    {"images.image", "store", "omezarr.groups", "normalisation", "markup"},
    {"ledger", "live"},
    {"links", "tasks", "workers"},
    {"images.assembly", "images.view", "omezarr.shrink"},
    {"images.from_zarr", "images.from_tiff", "images.from_slide", "images.from_hdf5", "images.from_n5"},
    {"images.from_folder"},
    {"images"},
    {"frames", "mask"},
    {"inputs"},
    {"omezarr.writer", "omezarr.labels", "working", "cluster", "networks.models", "segmenters"},
    {"omezarr", "networks", "networks.transformer", "networks.batches"},
    {"viewing.contrast", "viewing.server"},
    {"viewing.scene"},
    {"viewing.pieces"},
    {"viewing.state", "viewing.napari_layers"},
    {"viewing.browser"},
    {"viewing"},
    {"job", "networks.runner"},
    {"diameters", "rates", "reach", "regions", "opening"},
    {"features", "objects_at"},
    {"table", "exports.outlines", "exports.result"},
    {"exports.annotated", "exports.polygons", "exports.text"},
    {"exports.geojson", "exports.geoparquet", "exports.spatial"},
    {"exports"},
    {"pieces"},
    {"conversion"},
    {"survey", "flows", "masks", "stitch", "publish"},
    {"runs", "repair"},
    {"preflight", "batch.submission"},
    {"page"},
    {"report"},
    {"pipeline", "batch"},
    {"looks"},
    {"quicklook"},
    {"changes"},
    {"knobs"},
    {"tuning"},
    {"notebook"},
    {"training.pairs"},
    {"training.views"},
    {"training.fit"},
    {"training.tune"},
    {"quality.edges", "quality.sizes", "quality.subject"},
    {"quality.regions", "quality.records", "quality.places", "quality.table"},
    {"quality.findings"},
    {"quality.page"},
    {"napari.background", "napari.layers"},
    {"napari.target"},
    {"napari.choices", "napari.work"},
    {"napari", "napari.widget"},
    {"demo", "quality", "training"},
    {"cli.parser"},
    {"cli.texts"},
    {"cli.commands"},
    {"cli"},
    {"cli.__main__"},
]
HOMES = {
    "IPython": {"live"},
    "boto3": {"remote_clients"},
    "ipywidgets": {"knobs"},
    "obstore": {"patience", "remote", "remote_clients", "zarr_stores"},
    "numba": {"blend", "dynamics", "exports.outlines", "heat", "hulls", "lerp", "objects", "particles", "pool"},
    "h5py": {"images.from_hdf5"},
    "openslide": {"images.from_slide"},
    "tensorstore": {"images.from_n5"},
    "cloudpickle": {"cluster", "segmenters"},
    "distributed": {"clients", "cluster", "batch.scheduler"},
    "psutil": {"machine"},
    "tifffile": {"images.from_tiff"},
    "torch": {
        "gpu",
        "networks.fused",
        "networks.states",
        "networks.unet",
        "networks.attention",
        "networks.cpsam",
        "networks.batches",
        "networks.transformer",
        "networks.runner",
        "machine",
        "training.views",
        "training.fit",
        "training.tune",
    },
    "cellpose": {"networks.fetch", "networks.transformer"},
    "pooch": {"networks.fetch"},
    "pyarrow": {"exports.geoparquet", "exports.text", "objects_at", "pipeline", "quality.table", "table"},
    "tqdm": {"bars"},
    "PIL": {"canvas", "pictures"},
    "roifile": {"shapes"},
    "skimage": {"demo", "features", "inputs"},
    "numcodecs": {"chunks", "viewing.pieces"},
    "google_crc32c": {"chunks"},
    "napari": {"napari.widget", "viewing.napari_layers"},
    "qtpy": {"napari.background", "napari.widget"},
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """All modules but the package's front, which imports on demand; a subpackage counts as one."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name != "__init__":
            names[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return names


def row_of(module: str) -> int:
    rows = [i for i, row in enumerate(ROWS) if module in row]
    assert len(rows) == 1, f"{module} has no row, or more than one"
    return rows[0]


def inner_imports(module: str, tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports, at its top or inside functions."""
    is_package = (PACKAGE / module.replace(".", "/")).is_dir()
    parents = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parents[: len(parents) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*base, name]) for name in names}
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_come_from_rows_above(module: str) -> None:
    imported = inner_imports(module, modules()[module])
    assert {name for name in imported if row_of(name) >= row_of(module)} == set()


@functools.cache
def outer_imports(module: str) -> set[str]:
    """Packages from elsewhere that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("framework", HOMES)
def test_frameworks_have_one_home(framework: str) -> None:
    users = {module for module in modules() if framework in outer_imports(module)}
    assert users
    assert users <= HOMES[framework]
