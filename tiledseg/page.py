"""A report as one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .markup import document, escaped, figures, map_of, pairs, section, table
from .pictures import heat_map
from .preflight import size_text

__all__ = ["page_of"]

Facts = dict[str, Any]

MOST_PROCESSES = 16
"""That are listed."""


def page_of(facts: Facts, picture: npt.NDArray[np.int64] | None) -> str:
    """The page of a report.

    Parameters
    ----------
    facts : dict
        A `report.Report` as a dict, and what was written where: ``labels`` and ``table``.
    picture : array of int64, shape (y, x), or None
        Objects per block, of neighbouring blocks together where there are many.

    Returns
    -------
    page : str
    """
    sections = [
        section("Stages", _stages(facts)),
        section("Objects per block", _picture(facts, picture)),
        section("Kinds of work", _kinds(facts)),
        section("Neighbouring blocks", _agreement(facts)),
        section("Devices, memory and disks", _means(facts)),
        section("What was segmented", _subject(facts)),
        section("Parameters", pairs(facts["parameters"].items())),
        section("Versions", pairs(facts["versions"].items())),
    ]
    return document(f"tiledseg: {facts['image']['name']}", [facts["labels"], _ended(facts)], _figures(facts), sections)


def _ended(facts: Facts) -> str:
    calls = f"call {facts['n_calls']} on this scratch" if facts["n_calls"] > 1 else "in one call"
    return f"ended {facts['ended']}, {calls}, by {facts['workers']}"


def _figures(facts: Facts) -> str:
    """The numbers to see first."""
    shown = [(f"{facts['n_objects']:,}", "objects")]
    diameter = facts["diameter"]
    if diameter is not None:
        shown.append((f"{diameter['value']:.2f} px", f"diameter, {diameter['source']}"))
    shown.append((_seconds(facts["wall_seconds"]), "this call"))
    if facts["n_calls"] > 1:
        shown.append((_seconds(facts["whole_run"]["wall_seconds"]), f"all {facts['n_calls']} calls"))
    if facts["tiles_per_second"] is not None:
        shown.append((f"{facts['tiles_per_second']:,.1f}", "tiles per second"))
    if "all" in facts["pixels_per_second"]:
        shown.append((_large(facts["pixels_per_second"]["all"]), "pixels per second"))
    shown.append((_bytes(facts["peak_memory"]), "peak memory"))
    return figures(shown)


def _stages(facts: Facts) -> str:
    """Time, pieces and rates of each stage."""
    whole, is_resumed = facts["whole_run"], facts["n_calls"] > 1
    head = ["stage", "seconds", "pieces", "kept", "pixels/s"] + (["seconds, all calls"] if is_resumed else [])
    rows = []
    for stage, seconds in facts["seconds"].items():
        rate = facts["pixels_per_second"].get(stage)
        row = [stage, f"{seconds:.1f}", f"{facts['computed'][stage]:,}", f"{facts['kept'][stage]:,}"]
        row.append("" if rate is None else _large(rate))
        rows.append(row + ([f"{whole['seconds'].get(stage, 0):.1f}"] if is_resumed else []))
    lines = f"{facts['n_tiles']:,} tiles computed, {facts['n_skipped_tiles']:,} skipped as empty"
    if is_resumed:
        lines += f"; in all calls {whole['n_tiles']:,} and {whole['n_skipped_tiles']:,}"
    return table(head, rows) + f"<p>{escaped(lines)}</p>" + _trouble(facts)


def _trouble(facts: Facts) -> str:
    """What was done again, and what earlier calls could not do."""
    text = f"<p>{facts['retries']:,} retries</p>"
    if facts["quarantined"]:
        names = "; ".join(facts["quarantined"])
        text += f'<p class="bad">set aside by earlier calls, for they could not be computed then: {escaped(names)}</p>'
    return text


def _picture(facts: Facts, picture: npt.NDArray[np.int64] | None) -> str:
    """Objects per block, as a picture."""
    per_block = facts["per_block"]
    if per_block is None or picture is None:
        return "<p>not known: an earlier version stitched the blocks</p>"
    blocks, together = (" x ".join(str(n) for n in per_block[key]) for key in ("blocks", "together"))
    alone = all(n == 1 for n in per_block["together"])
    caption = f"{blocks} blocks; " + ("a square is one" if alone else f"a square puts {together} together")
    caption += f". {per_block['fewest']:,} to {per_block['most']:,} objects reach into a block."
    skipped = f"{facts['n_skipped_blocks']:,} of {facts['n_blocks']:,} blocks were skipped as empty."
    shown = map_of(heat_map(picture), "objects per block", ("1", f"{int(picture.max(initial=0)):,}"))
    return f"{shown}<p>{escaped(caption)} {escaped(skipped)} Grey: none.</p>"


def _kinds(facts: Facts) -> str:
    """What threads spent their time on."""
    whole, is_resumed = facts["whole_run"], facts["n_calls"] > 1
    source = whole if is_resumed else facts
    kinds = [*source["task_seconds"], *(kind for kind in source["cpu_seconds"] if kind not in source["task_seconds"])]
    total = sum(source["cpu_seconds"].values()) or 1.0
    rows = [
        [
            kind,
            f"{source['task_seconds'][kind]:.1f}" if kind in source["task_seconds"] else "",
            f"{source['cpu_seconds'].get(kind, 0.0):.1f}",
        ]
        for kind in kinds
    ]
    shares = [source["cpu_seconds"].get(kind, 0.0) / total for kind in kinds]
    text = table(["kind", "seconds of tasks", "CPU seconds", ""], rows, shares)
    return text + (f"<p>of all {facts['n_calls']} calls</p>" if is_resumed else "")


def _agreement(facts: Facts) -> str:
    """How well neighbouring blocks agreed."""
    n_cut = facts["n_seam"] - facts["n_seam_linked"]
    return pairs(
        [
            ("seen by two blocks", f"{facts['n_pairs']:,} objects"),
            ("as the same pixels", f"{facts['n_exact_pairs']:,}"),
            ("mean IoU of both views", f"{facts['mean_iou']:.4f}"),
            ("labels on borders", f"{facts['n_seam']:,}, of which {n_cut:,} cut there"),
            ("cut by the halo", f"{facts['n_cut_by_halo']:,} objects"),
            ("left out as too large", f"{facts['n_too_large']:,} objects"),
            ("block and halo", f"{_by(facts['block'])} and {_by(facts['halo'])} px"),
        ]
    )


def _means(facts: Facts) -> str:
    """What worked, how busy it was, and what it took."""
    whole, is_resumed = facts["whole_run"], facts["n_calls"] > 1
    rows: list[tuple[str, object]] = [("workers", facts["workers"]), ("network on", facts["device"] or "none")]
    for device, share in facts["busy"].items():
        of = "share of all threads in the network" if device == "cpu" else "a forward pass was under way"
        rows.append((f"{device} busy", f"{share:.0%} of the flows stage: {of}"))
    for name, key in (("read", "bytes_read"), ("written", "bytes_written")):
        text = _bytes(facts[key])
        rows.append((name, f"{text}; in all calls {_bytes(whole[key])}" if is_resumed else text))
    rows.append(("peak memory", f"{_bytes(facts['peak_memory'])}, of all processes"))
    rows += [(f"process {process}", _bytes(peak)) for process, peak in list(facts["peaks"].items())[:MOST_PROCESSES]]
    if len(facts["peaks"]) > MOST_PROCESSES:
        rows.append(("more processes", f"{len(facts['peaks']) - MOST_PROCESSES}, see report.json"))
    return pairs(rows)


def _subject(facts: Facts) -> str:
    """Image, what was shown of it, and what found the cells."""
    image, model = facts["image"], facts["model"]
    spacing = image["spacing_um"]
    rows: list[tuple[str, object]] = [
        ("image", image["name"]),
        ("shape", f"{_by(image['shape'])} ({image['axes']}), {image['dtype']}"),
        ("pixel size", "unknown" if spacing is None else " x ".join(f"{s:g}" for s in spacing) + " µm"),
        ("channels", ", ".join(image["channels"])),
        ("shown", facts["channel"]),
    ]
    if model is None:
        rows.append(("function", facts["segmenter"]))
    else:
        rows += [("model", f"{model['name']} ({model['architecture']})"), ("precision", model["precision"])]
        rows.append(("SHA-256 of the model", model["sha256"]))
    rows += [("labels", facts["labels"]), ("table", facts["table"]), ("scratch", facts["scratch"])]
    return pairs(rows)


def _by(numbers: Sequence[int]) -> str:
    return " x ".join(str(n) for n in numbers)


def _seconds(seconds: float) -> str:
    """A time for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _large(number: float) -> str:
    """A number with three digits and a prefix."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"


def _bytes(n: int | None) -> str:
    """Bytes with a unit that fits."""
    return "not known on this system" if n is None else size_text(n)
