"""The command line: a thin skin over the Python functions, generated from the settings."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .addresses import without_credentials
from .config import CHANNEL_SETTINGS, Settings
from .errors import SettingsError, TiledsegError

__all__ = ["main"]

MISUSED = 2
DIFFERENT = 1
UNREAD = 141
SHOWN_S = 0.05
TLS_FILES = {"--tls-ca-file": "authority", "--tls-cert": "certificate to show", "--tls-key": "key of that certificate"}
FOR_A_DIAMETER = CHANNEL_SETTINGS | {
    "invert",
    "model",
    "device",
    "precision",
    "foreground",
    "normalize",
    "missing_chunks",
}
"""Settings that an estimate of the diameter depends on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if compared labels differ, 2 for bad input."""
    options = _parser().parse_args(arguments)
    with _messages():
        return _run(options)


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Show what the package has to say while a command runs; other packages' logs stay as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Cleaned("tiledseg: %(message)s"))
    logger = logging.getLogger("tiledseg")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Cleaned(logging.Formatter):
    """Messages without what gives access: what a program says is kept in files."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def _run(options: argparse.Namespace) -> int:
    """Run the chosen command; its errors become one sentence."""
    try:
        code: int = options.command(options)
        sys.stdout.flush()
    except TiledsegError as error:
        if options.debug:
            raise
        print(without_credentials(f"tiledseg: {error}"), file=sys.stderr)
        return MISUSED
    except BrokenPipeError:
        # Whoever read the output, as `head`, has seen enough; Python would write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        print(f"tiledseg: interrupted{options.if_interrupted}.", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tiledseg", description="Segment images that do not fit.")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    segment = _add(commands, "segment", _segment, "label every cell of an image")
    segment.set_defaults(if_interrupted="; the same command again continues")
    segment.add_argument("image", metavar="IMAGE", help="OME-Zarr, Zarr or TIFF; s3:// or http(s):// of a Zarr")
    segment.add_argument(
        "-o", "--output", metavar="OUT", help="OME-Zarr for the labels, also s3:// (default: the image itself)"
    )
    _add_settings(segment, Settings)
    segment.add_argument("--workers", type=int, metavar="N", help="processes on this machine")
    segment.add_argument("--scheduler", metavar="ADDRESS|FILE", help="a running Dask scheduler")
    for flag, what in TLS_FILES.items():
        segment.add_argument(flag, metavar="PEM", help=f"of a scheduler behind TLS, the {what}")
    segment.add_argument(
        "--scratch", metavar="DIR", help="folder for what is in between (default: beside labels on a disk)"
    )
    segment.add_argument("--restart", action="store_true", help="discard what an earlier run left, and its labels")
    segment.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    segment.add_argument("--axes", metavar="AXES", help="axes of an array that does not say them, e.g. cyx")

    cluster = _add(commands, "cluster", _cluster, "segment with the workers of a batch system")
    cluster.set_defaults(if_interrupted="; the same command again continues")
    cluster.add_argument(
        "system",
        choices=("slurm", "lsf", "pbs", "local"),
        help="where jobs go (lsf and pbs follow the manuals and have not been tried; local: processes of this machine)",
    )
    cluster.add_argument("-c", "--config", metavar="TOML", required=True, help="what jobs to ask for")
    cluster.add_argument("--here", action="store_true", help="submit the workers alone, and wait for the run here")
    cluster.add_argument("--as-job", action="store_true", help=argparse.SUPPRESS)
    cluster.add_argument("--dry-run", action="store_true", help="print the job scripts, and stop")
    cluster.add_argument("--folder", metavar="DIR", help="for scripts and output of jobs (default: beside the labels)")
    cluster.add_argument(
        "arguments",
        nargs=argparse.PARSER,
        metavar="segment ...",
        help="the run, as without a cluster",
    )

    info = _add(commands, "info", _info, "show axes, shape, levels and what segment would do")
    info.add_argument("image", metavar="IMAGE")
    info.add_argument("--axes", metavar="AXES", help="axes of an array that does not say them")

    diameter = _add(commands, "diameter", _diameter, "estimate the diameter of the cells, and nothing else")
    diameter.add_argument("image", metavar="IMAGE")
    diameter.add_argument("--axes", metavar="AXES", help="axes of an array that does not say them")
    diameter.add_argument("--picture", metavar="PNG", help="write a histogram of the objects it rests on")
    _add_settings(diameter, Settings, only=FOR_A_DIAMETER)

    compare = _add(commands, "compare", _compare, "score labels against others")
    compare.add_argument("predicted", metavar="PREDICTED", help="labels: OME-Zarr, Zarr or TIFF")
    compare.add_argument("truth", metavar="TRUTH", help="labels to compare with")
    compare.add_argument(
        "--seams", type=int, metavar="BLOCK", help="score objects that cross an edge of such blocks apart"
    )
    compare.add_argument("--exact", action="store_true", help="only say whether they are bit-identical")

    _add(commands, "models", _models, "list the models that have a name")

    train = _add(commands, "train", _train, "fine-tune a U-Net on images with labels")
    train.set_defaults(if_interrupted="; give the .partial beside the model file to --from to go on with it")
    train.add_argument(
        "data",
        metavar="FOLDER|ZARR",
        help="a folder in which cell_masks.tif holds the labels of cell.tif, one with folders images and labels, or an "
        "OME-Zarr with labels; TIFF or PNG",
    )
    train.add_argument("-o", "--output", metavar="FILE", required=True, help="model file to write, for --model")
    train.add_argument("--from", dest="start", metavar="MODEL", default="tiledseg-nuclei", help="model to begin with")
    train.add_argument("--steps", type=int, metavar="N", default=1000, help="batches of 12 views (default: 1000)")
    train.add_argument("--rate", type=float, metavar="X", default=5e-4, help="largest learning rate (default: 0.0005)")
    train.add_argument("--seed", type=int, metavar="N", default=0, help="the same seed gives the same model")
    train.add_argument("--labels", metavar="NAME", help="labels of an OME-Zarr, if it has several")
    train.add_argument("--axes", metavar="AXES", help="axes of images that do not say them, e.g. cyx")
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    _add_settings(train, Settings, only=CHANNEL_SETTINGS)

    demo = _add(commands, "demo", _demo, "segment a real and a synthetic image, and score it")
    demo.add_argument("-o", "--output", metavar="DIR", default="tiledseg-demo", help="folder for the results")
    return parser


def _add(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    """A subcommand with the options all have."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=function, if_interrupted="")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_settings(command: argparse.ArgumentParser, settings: type, only: frozenset[str] | None = None) -> None:
    """One option per field of the stages' settings."""
    for stage in dataclasses.fields(settings):
        group = command.add_argument_group(stage.name)
        for field in dataclasses.fields(type(stage.default)):  # type: ignore[arg-type]
            if only is not None and field.name not in only:
                continue
            flag = f"--{field.name.replace('_', '-')}"
            facts = field.metadata
            if isinstance(field.default, bool):
                action = argparse.BooleanOptionalAction
                group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=facts["help"])
                continue
            kind = type(field.default) if isinstance(field.default, int | float) else str
            text = facts["help"].replace("%", "%%")
            if field.default is not None and "default" not in text:
                text += f" (default: {field.default})"
            group.add_argument(
                flag,
                type=kind,
                default=argparse.SUPPRESS,
                metavar=facts["metavar"],
                choices=facts["choices"] or None,
                help=text,
            )


def _settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line."""
    names = Settings().flat()
    return {name: value for name, value in vars(options).items() if name in names}


class _Bars:
    """A progress bar per stage, with rate and remaining time; those of stages at work at once below each other."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage not in self._bars:
            self._close([name for name, bar in self._bars.items() if bar.n >= bar.total])
            self._bars[stage] = tqdm(
                total=total, initial=done, desc=f"{stage:>8}", unit=" pieces", file=sys.stderr, position=len(self._bars)
            )
        bar = self._bars[stage]
        bar.update(done - bar.n)

    def close(self) -> None:
        """End the bars that are shown."""
        self._close(list(self._bars))

    def _close(self, stages: list[str]) -> None:
        for stage in stages:
            self._bars.pop(stage).close()


def _segment(options: argparse.Namespace) -> int:
    from .clients import certificates
    from .pipeline import preview, segment

    where = {"output": options.output, "scratch": options.scratch, "axes": options.axes}
    security = certificates(options.tls_ca_file, options.tls_cert, options.tls_key)
    workers = {"scheduler": options.scheduler, "workers": options.workers, "security": security}
    if options.dry_run:
        plan = preview(options.image, **where, **workers, measure=True, **_settings_of(options))
        _show(plan, options.json, _plan_text)
        if plan["refused"] is not None:
            raise SettingsError(plan["refused"])
        return 0
    bars = _Bars()
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
    paths = {"labels": result.path, "table": result.table_path, "report": result.report_path}
    facts = {**{name: str(path) for name, path in paths.items()}, **result.report.as_dict()}
    return _show(facts, options.json, _summary_text)


def _cluster(options: argparse.Namespace) -> int:
    words = tuple(word for i, word in enumerate(options.arguments) if i or word != "--")
    run = _parser().parse_args(words)
    if run.command is not _segment or run.scheduler or run.workers is not None or run.dry_run:
        raise SettingsError("a cluster runs 'segment IMAGE ...' without --scheduler, --workers and --dry-run.")
    from .batch import folder_of, submission_of

    folder = options.folder or folder_of(run.image, run.output, run.scratch, run.axes, _settings_of(run))
    submission = submission_of(options.system, Path(options.config), Path(folder), words)
    if options.dry_run:
        return _show(submission.scripts(), options.json, _scripts_text)
    if options.as_job:
        return submission.run_as_job()
    if options.here or options.system == "local":
        return submission.run_here()
    return _show(submission.submit(), options.json, lambda facts: [f"{k:<12} {v}" for k, v in facts.items()])


def _info(options: argparse.Namespace) -> int:
    from .images import open_image
    from .pipeline import preview

    image = open_image(options.image, axes=options.axes)
    try:
        facts = preview(options.image, None if image.writable_group else "OUT.ome.zarr", axes=options.axes)
    except TiledsegError as error:
        facts = {"image": image.describe(), "refused": str(error)}
    return _show(facts, options.json, _plan_text)


def _diameter(options: argparse.Namespace) -> int:
    from .pipeline import estimate_diameter

    bars = _Bars()
    try:
        found = estimate_diameter(
            options.image, picture=options.picture, axes=options.axes, progress=bars, **_settings_of(options)
        )
    finally:
        bars.close()
    return _show(dataclasses.asdict(found), options.json, lambda facts: [_diameter_text(facts)])


def _compare(options: argparse.Namespace) -> int:
    from .omezarr import open_labels
    from .scoring import compare, exact_difference

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
    return _show(found.as_dict(), options.json, _comparison_text)


def _models(options: argparse.Namespace) -> int:
    from .networks.models import list_models

    return _show({"models": list(list_models())}, options.json, _models_text)


def _train(options: argparse.Namespace) -> int:
    from .training import train

    bars = _Bars()
    names = ("start", "steps", "rate", "seed", "labels", "axes")
    given = {name: getattr(options, name) for name in names}
    try:
        report = train(options.data, options.output, progress=bars, **given, **_settings_of(options))
    finally:
        bars.close()
    return _show(report.as_dict(), options.json, _training_text)


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo

    bars = _Bars()
    try:
        facts = run_demo(Path(options.output), progress=bars, say=None if options.json else _printer(bars))
    finally:
        bars.close()
    return _show(facts, options.json, lambda _: [])


def _printer(bars: _Bars) -> Any:
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


def _scripts_text(facts: dict[str, Any]) -> list[str]:
    """Scripts one after another."""
    return [line for script, text in facts.items() for line in (f"==> {script} <==", *text.splitlines(), "")]


def _models_text(facts: dict[str, Any]) -> list[str]:
    """A paragraph per model."""
    lines = []
    for model in facts["models"]:
        state = model["path"] if model["is_here"] else f"not here; belongs to {model['path']}"
        lines += [f"{model['name']:<16} {model['purpose']}", f"{'':<16} {model['licence']}", f"{'':<16} {state}"]
    return lines


def _training_text(facts: dict[str, Any]) -> list[str]:
    """What was learned."""
    lines = [
        f"learned from {facts['n_images']} images, {facts['n_held_out']} held out; {facts['n_objects']:,} objects of "
        f"{facts['diameter']:.1f} px",
        f"loss         {facts['loss']:.3f}",
    ]
    for name, key in ((facts["start"], "ap_before"), ("the new model", "ap_after")):
        if facts[key] is not None:
            scores = ", ".join(f"{ap:.3f} at {iou:g}" for ap, iou in zip(facts[key], (0.5, 0.75, 0.9), strict=True))
            lines.append(f"precision    {scores} by {name}, on what was held out")
    return [*lines, f"model        {facts['model']}", f"size model   {facts['size_model']}"]


def _diameter_text(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    if found["source"] == "given":
        return f"{found['value']:.2f} px, as given"
    if found["source"] == "default":
        return f"{found['value']:.2f} px, a guess: too few objects were found"
    return (
        f"{found['value']:.2f} px (quartiles {low:.1f} and {high:.1f}, {found['n_objects']} objects in "
        f"{found['n_windows']} windows)"
    )


def _per_time_text(moments: list[dict[str, Any]]) -> str:
    """Of time points with a diameter each."""
    if not moments:
        return ""
    values = [moment["diameter"]["value"] for moment in moments]
    return f", the largest; from {min(values):.2f} px over {len(values)} time points"


def _summary_text(facts: dict[str, Any]) -> list[str]:
    """The closing summary of `segment`."""
    lines = [
        f"objects      {facts['n_objects']:,}",
        f"diameter     {_diameter_text(facts['diameter'])}{_per_time_text(facts['per_time'])}",
        f"blocks       {facts['n_blocks']}, of which {facts['n_skipped_blocks']} skipped as empty",
        f"tiles        {facts['n_tiles']} computed, {facts['n_skipped_tiles']} skipped as empty",
        f"seams        {facts['n_pairs']} objects seen by two blocks, {facts['n_exact_pairs']} as the same pixels, "
        f"mean IoU {facts['mean_iou']:.3f}, {facts['n_seam'] - facts['n_seam_linked']} cut",
        f"cut by halo  {facts['n_cut_by_halo']} objects"
        + ("; a larger --halo sees them whole" if facts["n_cut_by_halo"] else ""),
    ]
    if facts["n_nonfinite"]:
        lines.append(f"not finite   {facts['n_nonfinite']} pixels are NaN or infinite and were taken as background")
    if facts["n_too_large"]:
        lines.append(f"too large    {facts['n_too_large']} objects were left out")
    kept = {stage: n for stage, n in facts["kept"].items() if n}
    if kept:
        lines.append("resumed      " + ", ".join(f"{stage} {n} pieces kept" for stage, n in kept.items()))
    if facts["quarantined"]:
        lines.append("set aside    " + "; ".join(facts["quarantined"]) + " (by earlier calls; now done)")
    precision = f", in {facts['model']['precision']}" if facts["model"] else ""
    lines += [
        "seconds      " + _seconds_text(facts),
        f"peak memory  {facts['peak_memory'] / 2**30:.2f} GiB over all processes",
        f"worked on    {facts['device']}, {facts['workers']}{precision}",
        f"labels       {facts['labels']}",
        f"table        {facts['table']}",
        f"report       {facts['report']}",
        f"scratch      {facts['scratch']} (kept, so that mask settings can be changed; delete it when done)",
    ]
    return lines


def _seconds_text(facts: dict[str, Any]) -> str:
    """Seconds per stage, and in which two were at work."""
    text = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in facts["seconds"].items())
    at_once = facts["seconds_at_once"]
    return text if at_once < SHOWN_S else f"{text} (two stages at once for {at_once:.1f})"


def _plan_text(facts: dict[str, Any]) -> list[str]:
    """What an image is and what would be done with it."""
    image = facts["image"]
    lines = [
        f"image        {image['name']}",
        f"axes         {image['axes']}, shape {tuple(image['shape'])}, {image['dtype']}",
        f"channels     {', '.join(image['channels'])}",
        "pixel size   "
        + (" x ".join(f"{s:g}" for s in image["spacing_um"]) + " µm" if image["spacing_um"] else "unknown"),
    ]
    lines += [
        f"level {i}      shape {tuple(level['shape'])}, chunks {tuple(level['chunks'])}, {level['path'] or '.'}"
        for i, level in enumerate(image["levels"])
    ]
    if "n_blocks" not in facts:
        return [*lines, f"segment      would refuse: {facts['refused']}"]
    lines += ["segment      would do this:", *_needs_text(facts), f"  {'there is':<12} {facts['state']}"]
    return lines if facts["refused"] is None else [*lines, f"segment      would refuse: {facts['refused']}"]


def _needs_text(facts: dict[str, Any]) -> list[str]:
    """What a run would do and need."""
    from .preflight import size_text

    source = {"given": "as given", "assumed": "assumed, as the model's own; the survey will estimate it"}
    tasks = sorted(facts["task_bytes"].items(), key=lambda task: -task[1])
    rows = {
        "channel": facts["channel"],
        "diameter": f"{facts['diameter']:g} px, {source.get(facts['diameter_source'], 'as the survey found')}",
        "blocks": f"{facts['n_blocks']:,}, halo {facts['halo']} px",
        "tiles": f"{facts['n_tiles']:,} on a working grid of {facts['working_shape']}",
        "time": ", ".join(f"{stage} {_time_text(n)}" for stage, n in facts["seconds"].items())
        + " at the rate of this machine, more for reading and writing, less where nothing is"
        if facts["seconds"]
        else None,
        "memory": f"at most {size_text(facts['worker_bytes'])} per process, {size_text(facts['memory_bytes'])} in all "
        f"({facts['n_workers']} x {facts['n_threads']} threads)",
        "per task": ", ".join(f"{stage} {size_text(n)}" for stage, n in tasks),
        "labels": facts["labels"] and f"{facts['labels']} (with the table up to {size_text(facts['output_bytes'])})",
        "table": facts["table"],
        "scratch": facts["scratch"] and f"{facts['scratch']} (up to {size_text(facts['scratch_bytes'])})",
    }
    return [f"  {name:<12} {text}" for name, text in rows.items() if text is not None]


def _time_text(seconds: float) -> str:
    """A time for people: ``40 s``, ``12 min``, ``7.5 h`` or ``12 days``."""
    for unit, n_seconds, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / n_seconds:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def _comparison_text(facts: dict[str, Any]) -> list[str]:
    """A table of average precisions."""
    lines = [f"objects      {facts['overall']['n_predicted']} predicted, {facts['overall']['n_truth']} true"]
    for name in ("overall", "at_seams", "elsewhere"):
        score = facts[name]
        if score is not None:
            values = "  ".join(f"AP@{t:g} {ap:.3f}" for t, ap in zip(score["thresholds"], score["ap"], strict=True))
            lines.append(f"{name:<12} {values}  ({score['n_truth']} true objects)")
    if facts["n_cut"] is not None:
        lines.append(f"cut          {facts['n_cut']} true objects are cut at a block edge")
    lines.append("exact        " + ("bit-identical" if facts["exact"] else f"{facts['n_different']} pixels differ"))
    return lines


if __name__ == "__main__":
    sys.exit(main())
