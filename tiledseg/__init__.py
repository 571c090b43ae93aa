"""Cellpose segmentation of images that do not fit: the same cells whatever the blocks.

The pipeline, in the order in which a run goes through it:

1. `survey`, with `diameters`: percentiles, diameter and foreground of the whole image.
2. `flows`: the network on every tile of a fixed lattice, once.
3. `masks`: from flows to the cells of every block and its halo.
4. `stitch`: one identity for what several blocks saw.
5. `publish`: labels with pyramid in OME-Zarr, and a table.

`conversion` makes OME-Zarr of other images before that. `pipeline` runs the stages; `config` holds their settings;
`store` is where they meet; `cluster` does their `tasks`. `viewing`, `quicklook`, `tuning` and `quality` show what
comes of it, `exports` writes it for other programs, and `notebook` says how it looks in Jupyter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .canvas import Picture
    from .conversion import Conversion, convert
    from .exports import export
    from .images import Image, open_image
    from .job import Diameter
    from .pipeline import Plan, Segmentation, estimate_diameter, preview, segment
    from .quality import Quality, qc
    from .quicklook import show
    from .report import Report
    from .scoring import Comparison, compare
    from .training import TrainingReport, train
    from .tuning import Tuner, tune
    from .viewing import View, view

__all__ = [
    "Comparison",
    "Conversion",
    "Diameter",
    "Image",
    "Picture",
    "Plan",
    "Quality",
    "Report",
    "Segmentation",
    "TrainingReport",
    "Tuner",
    "View",
    "compare",
    "convert",
    "estimate_diameter",
    "export",
    "open_image",
    "preview",
    "qc",
    "segment",
    "show",
    "train",
    "tune",
    "view",
]

_HOMES = {
    "Comparison": "scoring",
    "Conversion": "conversion",
    "Diameter": "job",
    "Image": "images",
    "Picture": "canvas",
    "Plan": "pipeline",
    "Quality": "quality",
    "Report": "report",
    "Segmentation": "pipeline",
    "TrainingReport": "training",
    "Tuner": "tuning",
    "View": "viewing",
    "compare": "scoring",
    "convert": "conversion",
    "estimate_diameter": "pipeline",
    "export": "exports",
    "open_image": "images",
    "preview": "pipeline",
    "qc": "quality",
    "segment": "pipeline",
    "show": "quicklook",
    "train": "training",
    "tune": "tuning",
    "view": "viewing",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line's help needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tiledseg' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
