"""Streams of several stages at once: what may begin when, and what is done about failures."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiledseg
from tiledseg import flows, masks
from tiledseg.cli import main
from tiledseg.clients import TASKS_PER_GPU
from tiledseg.cluster import ThreadExecutor
from tiledseg.config import Settings
from tiledseg.errors import OutputError, QuarantineError, SettingsError
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.job import Diameter, Job, Moment, Surveyed
from tiledseg.networks.models import find_model
from tiledseg.omezarr import write_image
from tiledseg.progress import Progress
from tiledseg.reach import Order, Reach, grown_blocks
from tiledseg.store import MemoryStore
from tiledseg.tasks import MANY_QUARANTINED, Tasks

from .conftest import Slide


def test_what_goes_wrong_once_is_tried_again_by_itself() -> None:
    executor, failed, at_work, beside = ThreadExecutor(2), set(), [0], []
    lock = threading.Lock()

    def task(item: int) -> int:
        with lock:
            at_work[0] += 1
            beside.append((item, at_work[0]))
        try:
            time.sleep(0.002)
            if item % 5 == 0 and item not in failed:
                failed.add(item)
                raise ValueError("out of luck")
            return -item
        finally:
            with lock:
                at_work[0] -= 1

    assert dict(executor.stream(task, range(12))) == {item: -item for item in range(12)}
    assert executor.troubles.n_retried == len(failed) == 3
    assert [n for _, n in beside[-3:]] == [1, 1, 1], "a suspect does not run beside others"
    assert {item for item, _ in beside[-3:]} == {0, 5, 10}


def test_what_always_goes_wrong_is_named_when_all_else_is_done() -> None:
    executor, done = ThreadExecutor(2), []

    def task(item: int) -> int:
        return 1 // (item % 7)

    with pytest.raises(QuarantineError) as caught:
        done.extend(item for item, _ in executor.stream(task, range(1, 20), name="masks", where=lambda i: f"block {i}"))
    assert sorted(done) == [item for item in range(1, 20) if item % 7]
    reason = "ZeroDivisionError: integer division or modulo by zero"
    assert str(caught.value) == (
        f"2 pieces have failed whenever tried: masks block 7 ({reason}); masks block 14 ({reason}); all that can be "
        "done without them is done and kept, and the same command tries them again."
    )
    assert [piece.piece for piece in caught.value.pieces] == ["block 7", "block 14"]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert executor.troubles.quarantined == list(caught.value.pieces)


def test_where_everything_goes_wrong_the_end_comes_soon() -> None:
    tried = []

    def task(item: int) -> None:
        tried.append(item)
        raise KeyError(item)

    with pytest.raises(QuarantineError, match=f"{MANY_QUARANTINED} pieces have failed .*; and 11 more; "):
        list(ThreadExecutor(2).stream(task, range(1000)))
    assert len(tried) < 100


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (SettingsError("said in a sentence"), SettingsError, "said in a sentence"),
        (OSError(28, "No space left on device", "labels.zarr"), OutputError, "cannot write labels.zarr: No space"),
    ],
)
def test_what_can_be_foreseen_ends_the_stream_after_what_is_in_flight(
    error: Exception, raised: type[Exception], text: str
) -> None:
    ended = []

    def task(item: int) -> int:
        if item == 3:
            raise error
        time.sleep(0.01)
        ended.append(item)
        return item

    handed = []
    with pytest.raises(raised, match=text):
        handed.extend(item for item, _ in ThreadExecutor(2).stream(task, range(1000)))
    assert sorted(handed) == sorted(ended)
    assert len(ended) < 20


def test_a_stage_that_waits_for_another_goes_on_as_that_does() -> None:
    ready: list[int] = []
    log: list[str] = []

    def second() -> Any:
        for _ in range(6):
            while not ready:
                yield None
            yield ready.pop(0)

    def stage(name: str, items: Any, took: Callable[[int, int], None]) -> Tasks:
        return Tasks(name, abs, items, begin=lambda: log.append(f"begin {name}"), took=took)

    first = stage("first", range(6), lambda item, _: (log.append(f"first {item}"), ready.append(item))[0])
    ThreadExecutor(1).work(first, stage("second", second(), lambda item, _: log.append(f"second {item}")))
    assert log[0] == "begin first"
    assert sorted(line for line in log if line.startswith("second")) == [f"second {i}" for i in range(6)]
    assert all(log.index(f"first {i}") < log.index(f"second {i}") for i in range(6))
    log.clear()
    ThreadExecutor(1).work(stage("first", [], lambda *_: None), stage("second", [], lambda *_: None))
    assert log == ["begin first", "begin second"], "a stage with nothing to do says so"


def test_a_gpu_of_this_process_is_shared_by_few_tasks_while_others_go_on() -> None:
    executor, lock, at_work, most = ThreadExecutor(4), threading.Lock(), Counter[str](), Counter[str]()
    executor._has_gpu = True

    def task(_: int, kind: str) -> None:
        with lock:
            at_work[kind] += 1
            for name, n in (*at_work.items(), ("both", at_work.total())):
                most[name] = max(most[name], n)
        time.sleep(0.01)
        with lock:
            at_work[kind] -= 1

    executor.work(*(Tasks(kind, task, range(30), (kind,), kind=kind) for kind in ("network", "cpu")))
    assert most == {"network": TASKS_PER_GPU, "cpu": 4, "both": TASKS_PER_GPU + 4}


@given(st.data(), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_blocks_follow_the_chunks_under_them(data: Any, n_chunks: int, n_blocks: int, seed: int) -> None:
    numbers = st.sets(st.integers(0, n_chunks - 1))
    needs = [data.draw(numbers) for _ in range(n_blocks)]
    missing = data.draw(numbers)
    lost = data.draw(st.sets(st.sampled_from(sorted(missing)))) if missing else set()
    todo = sorted(data.draw(st.sets(st.integers(0, n_blocks - 1))))
    order, choose = Order(n_chunks, missing, todo, lambda block: needs[block]), random.Random(seed)
    chunks, blocks, live, given_out, let_go, done = order.chunks(), order.blocks(), [], [], [], set(range(n_chunks))
    done -= missing
    while True:
        live += itertools.islice(chunks, 3 - len(live))
        for block in itertools.takewhile(lambda block: block is not None, blocks):
            assert needs[block] <= done
            let_go.append(block)
        if not live:
            break
        chunk = live.pop(choose.randrange(len(live)))
        given_out.append(chunk)
        if chunk not in lost:
            order.done(chunk)
            done.add(chunk)
    assert sorted(given_out) == sorted(missing)
    assert sorted(let_go) == [block for block in todo if not needs[block] & lost]


SHAPES = {"yx": (500, 600), "zyx": (40, 90, 80)}
HOW: list[dict[str, Any]] = [
    {"diameter": 20.0, "block": 96},
    {"diameter": 20.0, "block": 96, "resample": False},
    {"diameter": 5.0, "block": 64, "halo": 9},
    {"diameter": 20.0, "block": 32, "do_3d": True, "anisotropy": 2.0, "flow3d_smooth": 1.5},
    {"diameter": 20.0, "block": 32, "halo": 8, "do_3d": True, "resample": False, "flow3d_smooth": 1.0},
    {"diameter": 20.0, "block": 48, "stitch_threshold": 0.3, "stitch_gap": 1},
]


@pytest.mark.parametrize("settings", HOW, ids=lambda settings: "-".join(map(str, settings)))
def test_a_block_reads_no_flows_but_of_chunks_that_it_waits_for(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_volume = "do_3d" in settings or "stitch_threshold" in settings
    axes = "zyx" if is_volume else "yx"
    image, chosen = open_image(np.zeros(SHAPES[axes], np.uint8), axes=axes), Settings.of(**settings)
    diameter = Diameter(settings["diameter"], "given", (settings["diameter"],) * 2)
    found = Surveyed((Moment(((0.0, 1.0),), False, diameter),), 0, (), 1.0)
    model = dataclasses.replace(find_model("tiledseg-nuclei"), tile=64, stride=40)
    job = Job(image, (Input((0,)),), chosen, model, "cpu", MemoryStore(), surveyed=found)
    reach, n, read = Reach(job), job.extent.n_flow_frames, set[int]()
    numbers = {(sheet.name, index): i for i in range(reach.n_chunks) for sheet, index in [reach.chunk(i)]}
    assert len(numbers) == reach.n_chunks > 2

    def spy(job: Job, frame: tuple[int, ...], region: tuple[slice, ...]) -> Any:
        for sheet in job.sheets:
            read.update(
                numbers[sheet.name, (*sheet.index_of(frame), *chunk)] for chunk in sheet.lattice.chunks_meeting(region)
            )
        return np.zeros((len(region) + 1, *(p.stop - p.start for p in region)), np.float32)

    monkeypatch.setattr(masks, "read_flows", spy)
    for number in range(job.blocks.n_blocks):
        block = job.blocks.at(job.blocks.index_of(number))
        under = reach.chunks_under(number)
        for plane in masks._planes_of(block, 0) if job.extent.is_stitched else [block]:
            for grown in grown_blocks(job, plane):
                read.clear()
                masks._values_of(job, tuple(p.start for p in plane.core[:n]), grown.padded[n:])
                assert read
                assert read <= under
    if not is_volume or "halo" in settings:
        assert len(reach.chunks_under(0)) < reach.n_chunks, "a block waits for the whole image: the test shows little"


def test_stages_at_work_at_once_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    told: list[tuple[str, int, int]] = []
    progress = Progress(lambda *said: told.append(said))
    progress.start("survey", 1, 0)
    progress.step()
    progress.start("flows", 3, 1)
    progress.step(stage="flows")
    progress.start("masks", 2, 0, beside=True)
    progress.step((1, 10), stage="masks")
    progress.step((2, 20), stage="flows")
    progress.step((1, 15), stage="masks")
    progress.stop()
    assert told[-4:] == [("masks", 0, 2), ("masks", 1, 2), ("flows", 3, 3), ("masks", 2, 2)]
    assert set(progress.seconds) == {"survey", "flows", "masks"}
    assert progress.seconds_at_once > 0
    assert sum(progress.seconds.values()) - progress.seconds_at_once <= next(clock)
    assert (progress.computed, progress.kept) == (
        {"survey": 1, "flows": 2, "masks": 2},
        {"survey": 0, "flows": 1, "masks": 0},
    )
    assert progress.peak_memory == 35


def test_a_run_completes_all_but_a_chunk_that_fails_and_then_only_that(
    slide: Slide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "slide.ome.zarr", slide[0], axes="yx", chunk=256)
    arguments = [
        "segment",
        str(tmp_path / "slide.ome.zarr"),
        *("-o", str(tmp_path / "out.ome.zarr"), "--diameter", "14", "--block", "256", "--foreground", "off"),
    ]

    def fails(number: int, job: Job) -> dict[str, Any]:
        if number == 1:
            raise RuntimeError("a network of glass")
        return real(number, job)

    real = flows.compute_chunk
    monkeypatch.setattr(flows, "compute_chunk", fails)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "1 piece has failed whenever tried: flows chunk (1, 0) of 0/yx at y " in said
    assert "(RuntimeError: a network of glass); all that can be done without it is done and kept" in said
    (scratch,) = tmp_path.glob("*.tiledseg")
    n_flows, n_masks = (
        sum(path.read_text().count(".") for path in scratch.glob(journal))
        for journal in ("flows.journal", "masks-*/masks.journal")
    )
    monkeypatch.undo()
    found = tiledseg.segment(arguments[1], arguments[3], diameter=14, block=256, foreground="off")
    assert (found.report.computed["flows"], found.report.kept["flows"]) == (1, n_flows)
    assert n_masks == 6, "blocks that do not need it"
    assert (found.report.computed["masks"], found.report.kept["masks"]) == (3, 6)
    again = tiledseg.segment(slide[0], diameter=14, block=512, foreground="off")
    assert np.array_equal(found.labels.compute(), again.labels.compute())
