"""The commands: from what the command line says to a function, and from what it gives to what is printed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bars import Bars
from ..config import ConvertConfig, Settings
from ..errors import SettingsError, TiledsegError
from .parser import EXPORTS, make_parser
from .texts import (
    comparison_text,
    conversion_text,
    diameter_text,
    models_text,
    plan_text,
    qc_text,
    scene_text,
    scripts_text,
    summary_text,
    training_text,
)

__all__ = ["COMMANDS"]

DIFFERENT = 1
"""Exit code where compared labels differ."""


def _settings_of(options: Namespace) -> dict[str, Any]:
    """The settings given on the command line."""
    names = Settings().flat()
    return {name: value for name, value in vars(options).items() if name in names}


def _segment(options: Namespace) -> int:
    from ..clients import certificates
    from ..pipeline import preview, segment

    where = {"output": options.output, "scratch": options.scratch, "axes": options.axes}
    security = certificates(options.tls_ca_file, options.tls_cert, options.tls_key)
    workers = {"scheduler": options.scheduler, "workers": options.workers, "security": security}
    if options.dry_run:
        plan = preview(options.image, **where, **workers, measure=True, **_settings_of(options))
        _show(plan, options.json, plan_text)
        if plan["refused"] is not None:
            raise SettingsError(plan["refused"])
        return 0
    bars = Bars()
    try:
        result = segment(
            options.image,
            **where,
            **workers,
            restart=options.restart,
            progress=bars,
            **_settings_of(options),
        )
    finally:
        bars.close()
    paths = {"labels": result.path, "table": result.table_path, **result.exports, "report": result.report_path}
    facts = {**{name: str(path) for name, path in paths.items()}, **result.report.as_dict()}
    return _show(facts, options.json, summary_text)


def _cluster(options: Namespace) -> int:
    words = tuple(word for i, word in enumerate(options.arguments) if i or word != "--")
    run = make_parser().parse_args(words)
    if run.command != "segment" or run.scheduler or run.workers is not None or run.dry_run:
        raise SettingsError("a cluster runs 'segment IMAGE ...' without --scheduler, --workers and --dry-run.")
    from ..batch import folder_of, submission_of

    folder = options.folder or folder_of(run.image, run.output, run.scratch, run.axes, _settings_of(run))
    submission = submission_of(options.system, Path(options.config), Path(folder), words)
    if options.dry_run:
        return _show(submission.scripts(), options.json, scripts_text)
    if options.as_job:
        return submission.run_as_job()
    if options.here or options.system == "local":
        return submission.run_here()
    return _show(submission.submit(), options.json, lambda facts: [f"{k:<12} {v}" for k, v in facts.items()])


def _convert(options: Namespace) -> int:
    from ..conversion import convert

    names = [field.name for field in dataclasses.fields(ConvertConfig)]
    settings = {name: value for name, value in vars(options).items() if name in names}
    how = {name: getattr(options, name) for name in ("axes", "overwrite", "workers", "scheduler")}
    bars = Bars()
    try:
        done = convert(options.image, options.output, progress=bars, **how, **settings)
    finally:
        bars.close()
    return _show(done.as_dict(), options.json, conversion_text)


def _info(options: Namespace) -> int:
    from ..images import open_image
    from ..pipeline import preview

    image = open_image(options.image, axes=options.axes)
    try:
        facts: dict[str, Any] = preview(
            options.image, None if image.writable_group else "OUT.ome.zarr", axes=options.axes
        )
    except TiledsegError as error:
        facts = {"image": image.describe(), "refused": str(error)}
    return _show(facts, options.json, plan_text)


def _diameter(options: Namespace) -> int:
    from ..pipeline import estimate_diameter

    bars = Bars()
    try:
        found = estimate_diameter(
            options.image, picture=options.picture, axes=options.axes, progress=bars, **_settings_of(options)
        )
    finally:
        bars.close()
    return _show(found.as_dict(), options.json, lambda facts: [diameter_text(facts)])


def _compare(options: Namespace) -> int:
    from ..omezarr import open_labels
    from ..scoring import compare, exact_difference

    predicted, truth = open_labels(options.predicted), open_labels(options.truth)
    if options.exact:
        n_different = exact_difference(predicted, truth)
        facts = {"exact": n_different == 0, "n_different": n_different}
        _show(
            facts,
            options.json,
            lambda f: ["bit-identical" if f["exact"] else f"{f['n_different']} pixels differ"],
        )
        return 0 if n_different == 0 else DIFFERENT
    found = compare(predicted, truth, block=options.seams)
    return _show(found.as_dict(), options.json, comparison_text)


def _export(options: Namespace) -> int:
    from ..exports import export

    targets = {kind: getattr(options, kind) for kind in EXPORTS if getattr(options, kind) is not None}
    if not targets:
        raise SettingsError(f"there is nothing to write; give one or more of --{', --'.join(EXPORTS)}.")
    written = export(options.result, targets, options.name)
    facts = dict(zip(targets, map(str, written), strict=True))
    return _show(facts, options.json, lambda f: [f"{kind:<12} {path}" for kind, path in f.items()])


def _qc(options: Namespace) -> int:
    from ..quality import qc

    names = ("name", "image", "channel", "scratch", "workers", "scheduler")
    bars = Bars()
    try:
        found = qc(
            options.result, page=options.output, progress=bars, **{name: getattr(options, name) for name in names}
        )
    finally:
        bars.close()
    return _show({"page": None if found.path is None else str(found.path), **found.as_dict()}, options.json, qc_text)


def _models(options: Namespace) -> int:
    from ..networks.models import list_models

    return _show({"models": list(list_models())}, options.json, models_text)


def _train(options: Namespace) -> int:
    from ..training import train

    bars = Bars()
    names = ("start", "steps", "rate", "seed", "labels", "axes")
    given = {name: getattr(options, name) for name in names}
    try:
        report = train(options.data, options.output, progress=bars, **given, **_settings_of(options))
    finally:
        bars.close()
    return _show(report.as_dict(), options.json, training_text)


def _view(options: Namespace) -> int:
    from ..viewing import View, open_scene

    scene = open_scene(options.out, options.image, options.name, options.axes)
    if options.napari:
        from ..viewing.napari_layers import show

        _show(scene.describe(), options.json, scene_text)
        show(scene)
        return 0
    with View(scene, options.port) as view:
        facts = {**scene.describe(), "address": view.url, "port": view.port}
        _show(facts, options.json, scene_text)
        sys.stdout.flush()
        if not options.no_browser and not view.open():
            print("tiledseg: no browser can be opened here.", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            view.wait()
    return 0


def _demo(options: Namespace) -> int:
    from ..demo import run_demo

    bars = Bars()
    try:
        facts = run_demo(Path(options.output), progress=bars, say=None if options.json else _printer(bars))
    finally:
        bars.close()
    return _show(facts, options.json, lambda _: [])


def _printer(bars: Bars) -> Any:
    """A print that ends the running bar first."""

    def say(line: str) -> None:
        bars.close()
        print(line, flush=True)

    return say


def _show(facts: dict[str, Any], as_json: bool, text: Any) -> int:
    """Print facts as JSON or as lines of text."""
    if as_json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        for line in text(facts):
            print(line)
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "segment": _segment,
    "cluster": _cluster,
    "convert": _convert,
    "info": _info,
    "diameter": _diameter,
    "compare": _compare,
    "export": _export,
    "qc": _qc,
    "models": _models,
    "train": _train,
    "view": _view,
    "demo": _demo,
}
"""Each command's function of its options, which gives the exit code."""
