"""Which commands there are, and their options."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..config import CHANNEL_SETTINGS, ConvertConfig, Settings

__all__ = ["EXPORTS", "make_parser"]

TLS_FILES = {"--tls-ca-file": "authority", "--tls-cert": "certificate to show", "--tls-key": "key of that certificate"}
EXPORTS = {
    "geojson": ("FILE", "outlines of the objects for QuPath"),
    "geoparquet": ("FILE", "outlines and table for GeoPandas or DuckDB"),
    "csv": ("FILE", "the table as text"),
    "anndata": ("ZARR", "the table as AnnData in Zarr, for scanpy and squidpy"),
    "spatialdata": ("ZARR", "labels and table as SpatialData"),
}
"""What `export` writes, and what it says of it."""
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
GOES_ON = "; the same command again continues"


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it gives names its command in ``command``."""
    parser = argparse.ArgumentParser(prog="tiledseg", description="Segment images that do not fit.")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_segment(_add(commands, "segment", "label every cell of an image", GOES_ON))
    _add_cluster(_add(commands, "cluster", "segment with the workers of a batch system", GOES_ON))
    _add_convert(_add(commands, "convert", "write an image as OME-Zarr with a pyramid", GOES_ON))
    _add_info(_add(commands, "info", "show axes, shape, levels and what segment would do"))
    _add_diameter(_add(commands, "diameter", "estimate the diameter of the cells, and nothing else"))
    _add_compare(_add(commands, "compare", "score labels against others"))
    _add_export(_add(commands, "export", "write labels and table of a finished run for other programs"))
    _add_qc(_add(commands, "qc", "look over finished labels: sizes, density, seams; a page with pictures"))
    _add(commands, "models", "list the models that have a name")
    goes_on = "; give the .partial beside the model file to --from to go on with it"
    _add_train(_add(commands, "train", "fine-tune a U-Net on images with labels", goes_on))
    _add_view(_add(commands, "view", "look at labels over their image, in the browser or in napari"))
    _add_demo(_add(commands, "demo", "segment a real and a synthetic image, and score it"))
    return parser


def _add(commands: Any, name: str, text: str, if_interrupted: str = "") -> argparse.ArgumentParser:
    """A command with the options all have."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=name, if_interrupted=if_interrupted)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_axes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--axes", metavar="AXES", help="axes of an array that does not say them, e.g. cyx")


def _add_workers(command: argparse.ArgumentParser) -> None:
    """Who works."""
    command.add_argument("--workers", type=int, metavar="N", help="processes on this machine")
    command.add_argument("--scheduler", metavar="ADDRESS|FILE", help="a running Dask scheduler")


def _add_segment(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "image", metavar="IMAGE", help="OME-Zarr, Zarr, TIFF, slide, HDF5 or N5; s3:// or http(s):// of a Zarr"
    )
    command.add_argument(
        "-o", "--output", metavar="OUT", help="OME-Zarr for the labels, also s3:// (default: the image itself)"
    )
    _add_settings(command, Settings)
    _add_workers(command)
    for flag, what in TLS_FILES.items():
        command.add_argument(flag, metavar="PEM", help=f"of a scheduler behind TLS, the {what}")
    command.add_argument(
        "--scratch", metavar="DIR", help="folder for what is in between (default: beside labels on a disk)"
    )
    command.add_argument("--restart", action="store_true", help="discard what an earlier run left, and its labels")
    command.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    _add_axes(command)


def _add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "system",
        choices=("slurm", "lsf", "pbs", "local"),
        help="where jobs go (lsf and pbs follow the manuals and have not been tried; local: processes of this machine)",
    )
    command.add_argument("-c", "--config", metavar="TOML", required=True, help="what jobs to ask for")
    command.add_argument("--here", action="store_true", help="submit the workers alone, and wait for the run here")
    command.add_argument("--as-job", action="store_true", help=argparse.SUPPRESS)
    command.add_argument("--dry-run", action="store_true", help="print the job scripts, and stop")
    command.add_argument("--folder", metavar="DIR", help="for scripts and output of jobs (default: beside the labels)")
    command.add_argument(
        "arguments", nargs=argparse.PARSER, metavar="segment ...", help="the run, as without a cluster"
    )


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "image",
        metavar="IN",
        help="TIFF, whole slide, FILE.h5/DATASET, N5, Zarr, or many TIFFs as 'FOLDER/img_{z}.tif' with t, c and z for "
        "planes, y and x for tiles",
    )
    command.add_argument("output", metavar="OUT", help="OME-Zarr to write, also s3://")
    _add_options(command, ConvertConfig)
    _add_axes(command)
    command.add_argument("--overwrite", action="store_true", help="replace the Zarr that OUT is")
    _add_workers(command)


def _add_info(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE")
    _add_axes(command)


def _add_diameter(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE")
    _add_axes(command)
    command.add_argument("--picture", metavar="PNG", help="write a histogram of the objects it rests on")
    _add_settings(command, Settings, only=FOR_A_DIAMETER)


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("predicted", metavar="PREDICTED", help="labels: OME-Zarr, Zarr or TIFF")
    command.add_argument("truth", metavar="TRUTH", help="labels to compare with")
    command.add_argument(
        "--seams", type=int, metavar="BLOCK", help="score objects that cross an edge of such blocks apart"
    )
    command.add_argument("--exact", action="store_true", help="only say whether they are bit-identical")


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("result", metavar="OUT", help="OME-Zarr that segment put its labels in")
    command.add_argument("--name", metavar="NAME", help="of the labels, if there are several")
    for kind, (metavar, text) in EXPORTS.items():
        command.add_argument(f"--{kind}", metavar=metavar, help=text)


def _add_qc(command: argparse.ArgumentParser) -> None:
    command.add_argument("result", metavar="OUT", help="what segment wrote, or any labels: OME-Zarr, Zarr or TIFF")
    command.add_argument("--name", metavar="NAME", help="of the labels, if there are several")
    command.add_argument(
        "--image", metavar="IMAGE", help="to show below outlines (default: the one that holds the labels)"
    )
    command.add_argument("--channel", metavar="CHANNEL", help="of the image, by name or index")
    command.add_argument("-o", "--output", metavar="PAGE", help="page to write (default: qc.html beside the table)")
    command.add_argument("--scratch", metavar="DIR", help="of the run (default: where its report says it is)")
    _add_workers(command)


def _add_train(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "data",
        metavar="FOLDER|ZARR",
        help="a folder in which cell_masks.tif holds the labels of cell.tif, one with folders images and labels, or an "
        "OME-Zarr with labels; TIFF or PNG",
    )
    command.add_argument("-o", "--output", metavar="FILE", required=True, help="model file to write, for --model")
    command.add_argument("--from", dest="start", metavar="MODEL", default="tiledseg-nuclei", help="model to begin with")
    command.add_argument("--steps", type=int, metavar="N", default=1000, help="batches of 12 views (default: 1000)")
    command.add_argument(
        "--rate", type=float, metavar="X", default=5e-4, help="largest learning rate (default: 0.0005)"
    )
    command.add_argument("--seed", type=int, metavar="N", default=0, help="the same seed gives the same model")
    command.add_argument("--labels", metavar="NAME", help="labels of an OME-Zarr, if it has several")
    _add_axes(command)
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    _add_settings(command, Settings, only=CHANNEL_SETTINGS)


def _add_view(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", metavar="OUT", help="OME-Zarr with labels, labels alone, or an image alone")
    command.add_argument("--image", metavar="IMAGE", help="what the labels were made from, if OUT is not it")
    command.add_argument("--name", metavar="NAME", help="which labels (default: all, the first shown)")
    _add_axes(command)
    command.add_argument("--napari", action="store_true", help="in napari instead of the browser")
    command.add_argument("--port", type=int, metavar="N", default=0, help="of the server here (default: any)")
    command.add_argument("--no-browser", action="store_true", help="only print the address")


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--output", metavar="DIR", default="tiledseg-demo", help="folder for the results")


def _add_settings(command: argparse.ArgumentParser, settings: type, only: frozenset[str] | None = None) -> None:
    """One option per field of the stages' settings."""
    for stage in dataclasses.fields(settings):
        _add_options(command.add_argument_group(stage.name), type(stage.default), only)


def _add_options(group: Any, config: type, only: frozenset[str] | None = None) -> None:
    """One option per field."""
    for field in dataclasses.fields(config):
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
