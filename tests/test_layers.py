"""A module imports only from rows above its own; each framework has one home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tiledseg"

ROWS = [
    {"errors", "axes"},
    {"config", "grid", "dynamics", "seams", "progress", "slides", "scoring", "pictures"},
    {"images", "store"},
    {"omezarr", "working", "cluster", "networks.models", "networks.unet"},
    {"networks.runner"},
    {"job"},
    {"survey", "flows", "masks", "stitch", "publish"},
    {"pipeline"},
    {"demo"},
    {"cli"},
]
HOMES = {
    "numba": {"dynamics"},
    "distributed": {"cluster"},
    "tifffile": {"images", "tiff"},
    "torch": {"networks.unet", "networks.runner", "cluster", "pipeline"},
    "pyarrow": {"publish", "pipeline"},
    "tqdm": {"cli"},
    "PIL": {"pictures"},
    "skimage": {"demo"},
}


def modules() -> dict[str, ast.Module]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            names[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = ast.parse(path.read_text())
    return names


def row_of(module: str) -> int:
    rows = [i for i, row in enumerate(ROWS) if module in row]
    assert len(rows) == 1, f"{module} has no row, or more than one"
    return rows[0]


def inner_imports(module: str, tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports, at its top or inside functions."""
    parents = module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parents[: len(parents) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*base, name]) for name in names}
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_come_from_rows_above(module: str) -> None:
    upward = {name for name in inner_imports(module, modules()[module]) if row_of(name) >= row_of(module)}
    same_row_helpers = {name for name in upward if row_of(name) == row_of(module)}
    stages = ROWS[6]
    assert not {name for name in upward if row_of(name) > row_of(module)}
    assert not (module in stages and same_row_helpers)


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
