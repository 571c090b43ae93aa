"""Stitch: the stage on real blocks and workers, and the merge at scale on drawn records."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tiledseg import stitch
from tiledseg.cluster import connect
from tiledseg.config import Settings
from tiledseg.grid import BlockGrid
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.job import Diameter, Job, Moment, Surveyed
from tiledseg.networks.models import find_model
from tiledseg.omezarr import write_image
from tiledseg.progress import Progress
from tiledseg.seams import match_seam
from tiledseg.stitch import merge_blocks, merge_memory
from tiledseg.store import DiskStore, MemoryStore, Store

from .strategies import Labels, ellipses
from .test_seams import cut, shared

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "stitch.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark's script, which draws the records."""
    spec = importlib.util.spec_from_file_location("bench_stitch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job_on(image: Any, block: int, halo: int, store: Store) -> Job:
    """A run that has come as far as the labels of its blocks."""
    settings = Settings.of(diameter=10.0, block=block, halo=halo)
    known = Surveyed((Moment(((0.0, 1.0),), False, Diameter(10.0, "given", (10.0, 10.0))),), 0, (), 1.0)
    return Job(
        open_image(image),
        (Input((0,)),),
        settings,
        find_model(settings.flows.model),
        "cpu",
        store,
        labels="masks",
        surveyed=known,
    )


def leave_blocks(job: Job, views: list[npt.NDArray[np.uint32]]) -> None:
    """Store labels of padded blocks, each 1..n, as the masks stage does."""
    grid = job.blocks
    job.store.create("masks/labels.zarr", (grid.n_blocks, *grid.padded_shape), (1, *grid.padded_shape), "uint32")
    flat = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    for number, labels in enumerate(views):
        block = grid.at(grid.index_of(number))
        core = labels[block.core_in_padded]
        first = [flat[block.core][core == label].min() for label in range(1, int(labels.max()) + 1)]
        job.store.open("masks/labels.zarr")[(number, *(slice(0, n) for n in labels.shape))] = labels
        job.store.save(f"masks/objects/{number}", np.array([0, 0, *first], np.int64))


def views_of(field: Labels, grid: BlockGrid) -> list[npt.NDArray[np.uint32]]:
    """What blocks see of a field: the objects that reach into their core, numbered anew in each."""
    views = []
    for number in range(grid.n_blocks):
        block = grid.at(grid.index_of(number))
        present = np.unique(field[block.core])
        local = np.zeros(int(field.max()) + 1, np.uint32)
        local[present[present > 0]] = np.arange(1, np.count_nonzero(present) + 1)
        views.append(local[field[block.padded]])
    return views


def painted(job: Job, views: list[npt.NDArray[np.uint32]]) -> npt.NDArray[np.uint32]:
    """Every core with its global ids."""
    out = np.zeros(job.blocks.shape, np.uint32)
    for number, labels in enumerate(views):
        block = job.blocks.at(job.blocks.index_of(number))
        ids = np.concatenate([[0], job.store.load(f"masks/ids/{number}")]).astype(np.uint32)
        out[block.core] = ids[labels[block.core_in_padded]]
    return out


def test_the_stage_gives_back_the_field_and_goes_on_where_it_was(tmp_path: Path, client: Any) -> None:
    field = ellipses((150, 190), 10.0, 500, seed=2)
    write_image(tmp_path / "image.ome.zarr", np.zeros(field.shape, np.uint8), axes="yx")
    job = job_on(tmp_path / "image.ome.zarr", block=40, halo=25, store=DiskStore(tmp_path / "scratch"))
    views = views_of(field, job.blocks)
    leave_blocks(job, views)
    progress = Progress()
    with connect(client) as executor:
        facts = stitch.run(job, executor, progress)
        np.testing.assert_array_equal(painted(job, views), field)
        assert facts["n_objects"] == field.max() > 100
        assert facts["n_pairs"] == facts["n_exact_pairs"] > 50
        assert facts["mean_iou"] == 1.0
        assert facts["n_seam"] == facts["n_seam_linked"] >= 2 * facts["n_pairs"]
        # Killed within the merge: some ids are there, what sums it up is not.
        job.store.remove("masks/stitch.json")
        job.store.remove("masks/ids/1")
        job.store.save("masks/ids/0", np.zeros(0, np.uint32))
        assert stitch.run(job, executor, progress) == facts
        assert (progress.kept["stitch"], progress.computed["stitch"]) == (job.blocks.n_blocks, 1)
    np.testing.assert_array_equal(painted(job, views), field)


def test_blocks_that_disagree_are_counted() -> None:
    job = job_on(np.zeros((10, 60)), block=20, halo=5, store=MemoryStore())
    left, middle, right = (np.zeros((10, n), np.uint32) for n in (25, 30, 25))
    left[2:4, 16:24] = 1  # 8 columns for the left block, ...
    middle[2:4, 1:7] = 1  # ... the first 6 of them for the one beside it,
    left[6:8, 18:22] = 2  # and one that the left block alone sees,
    middle[6:8, 22:28] = 2  # as this one, where the third block found nothing.
    leave_blocks(job, [left, middle, right])
    with connect(small=True) as executor:
        facts = stitch.run(job, executor, Progress())
    assert (facts["n_pairs"], facts["n_exact_pairs"], facts["mean_iou"]) == (1, 0, 0.75)
    # Both blocks' view of the pair, and the two that have no partner.
    assert (facts["n_seam"], facts["n_seam_linked"]) == (4, 2)
    assert facts["n_objects"] == 3


def test_no_seams_agree_perfectly() -> None:
    job = job_on(np.zeros((30, 30)), block=30, halo=5, store=MemoryStore())
    leave_blocks(job, [np.eye(30, dtype=np.uint32)])
    with connect(small=True) as executor:
        facts = stitch.run(job, executor, Progress())
    assert (facts["n_objects"], facts["n_pairs"], facts["mean_iou"], facts["n_seam"]) == (1, 0, 1.0, 0)


@pytest.mark.parametrize(
    ("shape", "core"), [((31, 40), (7, 11)), ((31, 40), (40, 8)), ((31, 40), (8, 40)), ((9, 14, 17), (4, 5, 6))]
)
def test_merge_in_any_number_of_axes(shape: tuple[int, ...], core: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    field = np.zeros(shape, np.int32)
    for value, at in enumerate(rng.permutation(field.size)[: field.size // 12], start=1):
        box = tuple(slice(i, i + 2) for i in np.unravel_index(at, shape))
        field[box] = np.where(field[box], field[box], value)
    values, first = np.unique(field, return_index=True)
    ids = np.zeros(int(field.max()) + 1, np.int32)
    ids[values[values > 0][np.argsort(first[values > 0])]] = np.arange(1, np.count_nonzero(values) + 1)
    field = ids[field]
    store, grid = MemoryStore(), BlockGrid(shape, core, (2,) * len(shape))
    blocks = cut(field, core, 2, rng)
    for number, block in enumerate(blocks):
        pairs = [np.zeros((0, 3), np.int64)]
        for other in range(number + 1, grid.n_blocks):
            if (seen := shared(block, blocks[other])) is not None:
                found, _ = match_seam(*seen, 0.5)
                pairs.append(np.insert(found.astype(np.int64), 1, other, axis=1))
        store.save(f"m/objects/{number}", np.concatenate([[1, number == 0], block["first"]]))
        store.save(f"m/pairs/{number}", np.concatenate(pairs))
        store.save(f"m/agreement/{number}", np.array([0.0, 0, 0, 0, 0]))
    facts = merge_blocks(store, "m", grid)
    assert (facts["n_objects"], facts["n_cut_by_halo"], facts["n_skipped_blocks"]) == (field.max(), grid.n_blocks, 1)
    for number, block in enumerate(blocks):
        inner = tuple(slice(s.start - o[0], s.stop - o[0]) for s, o in zip(block["core"], block["box"], strict=True))
        local = np.concatenate([[0], store.load(f"m/ids/{number}")])
        np.testing.assert_array_equal(local[block["labels"][inner]], field[block["core"]])


@pytest.mark.parametrize(("n_objects", "blocks_per_side"), [(1, 1), (50, 9), (3000, 1), (3000, 7)])
def test_the_benchmark_draws_what_the_merge_must_find(
    bench: ModuleType, tmp_path: Path, n_objects: int, blocks_per_side: int
) -> None:
    store, grid = DiskStore(tmp_path), bench.geometry(n_objects, blocks_per_side)
    n_links = bench.build(store, grid, n_objects)
    facts = merge_blocks(store, bench.FOLDER, grid)
    assert (facts["n_objects"], facts["n_pairs"], facts["n_seam"]) == (n_objects, n_links, 2 * n_links)
    expected = bench.expected_ids(grid, n_objects)
    assert len(expected) == grid.n_blocks
    for number, ids in enumerate(expected):
        np.testing.assert_array_equal(store.load(f"{bench.FOLDER}/ids/{number}"), ids)


def test_the_benchmark_runs_and_says_what_it_misses(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"n_wanted": 10**6, "n_objects": 10**6, "n_wrong": 0, "n_links": 5, "seconds": 1.0, "peak": 1, "above": 1}
    large = {**row, "n_wanted": 10**7, "n_objects": 10**7}
    assert bench.missed([row, {**large, "seconds": 12.0}]) == []
    assert bench.missed([row, {**large, "seconds": 12.1}]) == ["the last tenfold took 12.1 times as long"]
    assert bench.missed([{**row, "n_wrong": 2}]) == ["1,000,000 objects became 1,000,000, with wrong ids in 2 blocks"]
    assert bench.missed([{**row, "peak": 2**31}]) == ["1,000,000 objects took 1 s and 2.00 GiB"]
    monkeypatch.setattr("sys.argv", ["stitch.py", "--max", "300", "--blocks", "3"])
    assert bench.main() == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "300"


@pytest.mark.parametrize(
    ("n_objects", "blocks_per_side"),
    [
        (100_000, 16),  # mostly links
        (300_000, 2),  # mostly labels of a slab
        (1_000_000, 12),
    ],
)
def test_the_merge_needs_what_is_projected(
    bench: ModuleType, tmp_path: Path, n_objects: int, blocks_per_side: int
) -> None:
    store, grid = DiskStore(tmp_path), bench.geometry(n_objects, blocks_per_side)
    n_links = bench.build(store, grid, n_objects)
    projected = merge_memory(bench.fullest_slab(store, grid), n_links, grid.n_blocks)
    tracemalloc.start()
    merge_blocks(store, bench.FOLDER, grid)
    _, measured = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert measured <= projected <= 3 * measured


def test_a_thousand_million_objects_fit_into_a_workstation() -> None:
    """10^9 objects in 160 000 blocks (400 x 400), with 10 % of the nodes linked: 5.6 GB.

    Linked nodes come in pairs, so 10^9 objects are 1.05 x 10^9 nodes at the least, with 5.3 x 10^7
    links (5.3 GB, all at once); a slab of 400 blocks has 2.6 x 10^6 nodes (0.2 GB), and 160 000
    blocks take 0.06 GB. Records of all nodes at once, as 8 bytes of first pixel alone, would be 8.4 GB.
    """
    n_nodes = round(10**9 / 0.95)
    n_links = n_nodes // 20
    needed = merge_memory(n_nodes // 400, n_links, 160_000)
    assert 5.5e9 < needed < 6e9
    assert merge_memory(n_nodes // 400, 0, 160_000) < 0.3e9, "the rest grows with slabs and blocks, not with objects"
