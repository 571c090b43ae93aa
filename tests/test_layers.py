"""A module imports only from rows above its own; each framework has one home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tiledseg"

ROWS = [
    {"addresses", "errors", "meters", "waiting", "images.units"},
    {"disk", "images.damage"},
    {"folders", "lock"},
    {
        "axes",
        "batch.config",
        "claims",
        "cores",
        "shapes",
        "tls",
        "foreground",
        "lerp",
        "malloc",
        "overlaps",
        "networks.fetch",
        "networks.size",
        "networks.states",
    },
    {"machine", "objects", "particles", "networks.unet", "networks.attention", "batch.systems", "patience", "urls"},
    {"clients", "heat", "batch.scripts", "remote_clients"},
    {"gpu", "batch.scheduler", "remote"},
    {"zarr_stores"},
    {"batch.supervisor", "config", "grid", "dynamics", "seams", "progress", "slides", "volumes", "scoring", "pictures"},
    {"images.image", "store", "omezarr.groups", "normalisation"},
    {"ledger"},
    {"links", "tasks", "workers"},
    {"images.assembly", "images.view", "omezarr.writer"},
    {"images.from_zarr", "images.from_tiff"},
    {"images"},
    {"frames", "mask"},
    {"inputs"},
    {"omezarr.labels", "working", "cluster", "networks.models", "segmenters"},
    {"omezarr", "networks", "networks.transformer", "networks.batches"},
    {"job", "networks.runner"},
    {"rates", "reach"},
    {"survey", "flows", "masks", "stitch", "publish"},
    {"runs", "repair"},
    {"preflight", "batch.submission"},
    {"page"},
    {"report"},
    {"pipeline", "batch"},
    {"training.pairs"},
    {"training.views"},
    {"training.fit"},
    {"training.tune"},
    {"demo", "training"},
    {"cli"},
]
HOMES = {
    "boto3": {"remote_clients"},
    "obstore": {"patience", "remote", "remote_clients", "zarr_stores"},
    "numba": {"dynamics", "heat", "lerp", "objects", "particles"},
    "cloudpickle": {"segmenters"},
    "distributed": {"clients", "cluster", "machine", "batch.scheduler"},
    "tifffile": {"images.from_tiff"},
    "torch": {
        "gpu",
        "networks.states",
        "networks.unet",
        "networks.attention",
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
    "pyarrow": {"publish", "pipeline"},
    "tqdm": {"cli"},
    "PIL": {"pictures"},
    "roifile": {"shapes"},
    "skimage": {"demo", "inputs"},
}


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


@pytest.mark.parametrize("framework", HOMES)
def test_frameworks_have_one_home(framework: str) -> None:
    users = set()
    for module, tree in modules().items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            if any(name.split(".")[0] == framework for name in names):
                users.add(module)
    assert users
    assert users <= HOMES[framework]


def test_help_is_instant() -> None:
    """The modules that the command line's help needs import none of the heavy packages."""
    heavy = {"torch", "numba", "dask", "distributed", "zarr", "scipy", "skimage", "pyarrow"}
    trees = modules()
    for module in ("cli", "config", "errors"):
        top = [n for n in trees[module].body if isinstance(n, ast.Import | ast.ImportFrom)]
        for node in top:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & heavy
