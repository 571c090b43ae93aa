"""Geometry: cores partition, halos contain cores, the lattice's weights add up to one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledseg import flows
from tiledseg.blend import add_half
from tiledseg.errors import SettingsError
from tiledseg.grid import BlockGrid, Lattice, WorkingGrid, interpolate, overlap, samples_needed, shift
from tiledseg.job import CELLPROB_FLOOR

shapes = st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple)


@st.composite
def block_grids(draw: st.DrawFn) -> BlockGrid:
    n = draw(st.integers(2, 3))
    shape = tuple(draw(st.lists(st.integers(1, 14), min_size=n, max_size=n)))
    block = tuple(draw(st.lists(st.integers(2, 17), min_size=n, max_size=n)))
    halo = tuple(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    return BlockGrid(shape, block, halo)


@given(block_grids())
def test_cores_partition_the_image(grid: BlockGrid) -> None:
    seen = np.zeros(grid.shape, int)
    for number in range(grid.n_blocks):
        block = grid.at(grid.index_of(number))
        assert grid.number(block.index) == number
        seen[block.core] += 1
    assert (seen == 1).all()


@given(block_grids())
def test_padded_blocks_contain_their_core_and_stay_inside(grid: BlockGrid) -> None:
    image = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    for number in range(grid.n_blocks):
        block = grid.at(grid.index_of(number))
        padded = image[block.padded]
        assert np.array_equal(padded[block.core_in_padded], image[block.core])
        assert all(n <= m for n, m in zip(padded.shape, grid.padded_shape, strict=True))


@given(block_grids())
def test_every_pair_of_neighbours_is_met_once(grid: BlockGrid) -> None:
    met = [
        (grid.number(index), grid.number(other))
        for index in itertools.product(*(range(n) for n in grid.counts))
        for other in grid.later_neighbours(index)
    ]
    assert len(met) == len(set(met))
    assert all(a < b for a, b in met)
    indices = list(itertools.product(*(range(n) for n in grid.counts)))
    touching = sum(
        max(abs(i - j) for i, j in zip(a, b, strict=True)) == 1 for a, b in itertools.combinations(indices, 2)
    )
    assert len(met) == touching


@given(block_grids(), st.data())
def test_touching_finds_the_blocks_of_a_region(grid: BlockGrid, data: st.DataObject) -> None:
    region = []
    for n in grid.shape:
        start = data.draw(st.integers(0, n - 1))
        region.append(slice(start, data.draw(st.integers(start + 1, n))))
    every = itertools.product(*(range(n) for n in grid.counts))
    wanted = [index for index in every if overlap(grid.at(index).core, tuple(region))]
    assert list(grid.touching(tuple(region))) == wanted


lattices = st.builds(
    lambda shape, k: Lattice(shape, tile=32, stride=24, margin=4, tiles_per_chunk=k),
    shapes,
    st.integers(1, 4),
)


@given(lattices)
def test_weights_of_all_tiles_add_up_to_one_everywhere(lattice: Lattice) -> None:
    total = np.zeros(lattice.shape)
    for tile in itertools.product(*(range(n) for n in lattice.counts)):
        region = lattice.tile_region(tile)
        weights = np.ones((1,) * len(tile), np.float32)
        for axis, share in enumerate(lattice.weights(tile)):
            weights = weights * share.reshape((-1,) + (1,) * (len(tile) - 1 - axis))
        inside = overlap(region, tuple(slice(0, n) for n in lattice.shape))
        assert inside is not None
        total[inside] += weights[
            tuple(slice(p.start - q.start, p.stop - q.start) for p, q in zip(inside, region, strict=True))
        ]
    np.testing.assert_allclose(total, 1, rtol=1e-5)


@given(lattices, st.data())
def test_chunks_meeting_a_region_are_all_that_cover_it(lattice: Lattice, data: st.DataObject) -> None:
    region = []
    for n in lattice.shape:
        start = data.draw(st.integers(0, n - 1))
        region.append(slice(start, data.draw(st.integers(start + 1, n))))
    wanted = [chunk for chunk in lattice.chunks() if overlap(lattice.piece_region(chunk), tuple(region))]
    assert lattice.chunks_meeting(tuple(region)) == wanted


@given(lattices)
def test_every_tile_belongs_to_one_chunk_and_fits_its_piece(lattice: Lattice) -> None:
    tiles = []
    for chunk in lattice.chunks():
        piece = lattice.piece_region(chunk)
        for tile in lattice.tiles_of(chunk):
            tiles.append(tile)
            region = lattice.tile_region(tile)
            assert overlap(region, piece) == region
    assert sorted(tiles) == list(itertools.product(*(range(n) for n in lattice.counts)))


@given(st.integers(2, 60), st.floats(0.2, 3.0), st.data())
def test_interpolating_a_part_gives_the_bits_of_the_whole(n: int, scale: float, data: st.DataObject) -> None:
    values = np.random.default_rng(0).normal(size=n).astype(np.float32)
    grid = WorkingGrid((n,), (scale,))
    everything = grid.to_image(0, grid.shape[0], 0)
    whole = interpolate(values, [(everything, n, 0)])
    start = data.draw(st.integers(0, grid.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, grid.shape[0]))
    part = grid.to_image(start, stop, 0)
    needed = samples_needed(part, n)
    assert np.array_equal(interpolate(values[needed], [(part, n, needed.start)]), whole[start:stop])


def test_interpolation_is_linear_between_pixel_centres() -> None:
    values = np.array([[0.0, 2.0], [4.0, 6.0]], np.float32)
    at = [(np.array([0.25]), 2, 0), (np.array([0.5]), 2, 0)]
    assert interpolate(values, at).item() == pytest.approx(0.25 * 4 + 0.5 * 2)


def test_working_pixels_lie_at_the_centres_design_gives() -> None:
    grid = WorkingGrid.for_diameter((100, 50), diameter=34.0, diam_mean=17.0)
    assert grid.shape == (50, 25)
    np.testing.assert_allclose(grid.to_image(0, 2, 0), [0.5, 2.5])
    np.testing.assert_allclose(grid.from_image(0, 2, 0), [-0.25, 0.25])


@pytest.mark.parametrize("diameter", [0.1, 1e6])
def test_absurd_diameters_are_refused(diameter: float) -> None:
    with pytest.raises(SettingsError, match=r"diameter .* would scale the image by .*; give a diameter from"):
        WorkingGrid.for_diameter((100, 100), diameter, 17.0)


@pytest.mark.parametrize("thin", [None, 0, 1, 2])
def test_tiles_are_blended_as_numpy_does_to_the_bit(thin: int | None) -> None:
    rng = np.random.default_rng(0)
    shape = tuple(5 if axis == thin else 90 for axis in range(2 if thin is None else 3))
    lattice = Lattice(shape, tile=48, stride=32, thin=thin, tiles_per_chunk=2, planes_per_chunk=3)
    chunk = lattice.chunk_counts[0] - 1, *(0,) * (len(shape) - 1)
    piece, tiles = lattice.piece_region(chunk), lattice.tiles_of(chunk)
    outputs = {tile: rng.normal(0, 10, (3, 48, 48)).astype(np.float32) for tile in tiles[1:]}
    outputs[tiles[1]][:, 5, 7] = np.nan, 3e38, np.nan
    expected = np.zeros((3, *(p.stop - p.start for p in piece)), np.float32)
    for tile, output in outputs.items():
        logit = np.maximum(output[2], np.float32(CELLPROB_FLOOR)) - np.float32(CELLPROB_FLOOR)
        rows, columns = lattice.along_plane(lattice.weights(tile))
        weighted = np.stack([output[0], output[1], logit]) * rows[:, None] * columns
        where = shift(lattice.tile_region(tile), tuple(p.start for p in piece))
        expected[(slice(None), *where)] += weighted.reshape(3, *lattice.sides)
    with np.errstate(over="ignore"):
        halved = expected.astype(np.float16)
    batches = [([tile], output[None]) for tile, output in outputs.items()]
    together = [(list(outputs), np.stack(list(outputs.values())))]
    for found in (batches, together):
        np.testing.assert_array_equal(flows.process_block(found, lattice, piece), halved)


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 4, 40)])
def test_pieces_are_added_as_numpy_does_to_the_bit(shape: tuple[int, int, int]) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    rng = np.random.default_rng(7)
    sums = rng.standard_normal((4, 12, 60)).astype(np.float32)
    for piece in (rng.choice(every, shape), np.resize(every[2**10 :: 977], shape)):
        expected = sums.copy()
        with np.errstate(invalid="ignore"):
            expected[1 : 1 + shape[0], 2 : 2 + shape[1], 3 : 3 + shape[2]] += piece
        add_half(piece, sums, 1, 2, 3)
        np.testing.assert_array_equal(sums, expected)


def test_every_float16_is_widened_to_its_value() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, 256, 256)
    widened = np.zeros(every.shape, np.float32)
    add_half(every, widened, 0, 0, 0)
    np.testing.assert_array_equal(widened, every.astype(np.float32))
