"""One run of one peer, inside the peer's own environment: nothing of tiledseg is imported here.

    python peer_runs.py PEER job.json

The job says where image, weights and result are, and what all peers are told alike: diameter,
the values that become 0 and 1, block, number of cores.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

HALO_DIAMETERS = 2
"""Of patchworks; contrib takes two diameters by itself."""
STYLE = 256
"""Length of the style vector that Cellpose 3's run_net has room for."""


def use_width(widths: list[int]) -> None:
    """Have Cellpose 3 build its network as wide as the weights are; it knows one width only."""
    import torch
    from cellpose import models
    from cellpose.resnet_torch import CPnet

    class Narrow(CPnet):
        """The same network with other numbers of channels."""

        def __init__(self, _nbase: list[int], *args: Any, **options: Any) -> None:
            CPnet.__init__(self, list(widths), *args, **options)

        def forward(self, data: Any) -> Any:
            output, style, features = CPnet.forward(self, data)
            return output, torch.nn.functional.pad(style, (0, STYLE - style.shape[1])), features

    models.CPnet = Narrow


def eval_options(job: dict[str, Any]) -> dict[str, Any]:
    """What `CellposeModel.eval` is told, the same for every peer."""
    # One pair per channel: a single pair would also rescale the empty second channel, and nothing is found.
    normalize = {"lowhigh": [job["percentiles"], [0.0, 1.0]]}
    return {"diameter": job["diameter"], "channels": [0, 0], "normalize": normalize}


def untiled(job: dict[str, Any]) -> None:
    """Cellpose on the whole image at once."""
    import torch
    from cellpose import models

    torch.set_num_threads(job["cores"])
    use_width(job["widths"])
    model = models.CellposeModel(gpu=False, pretrained_model=job["weights"])
    labels = model.eval(np.load(job["image"]), **eval_options(job))[0]
    np.save(job["result"], labels)


def contrib(job: dict[str, Any]) -> None:
    """Cellpose's own distributed segmentation, from the file that PYTHONPATH leads to."""
    import distributed
    import distributed_segmentation
    import zarr

    # Several processes on one GPU would take turns, each with a network of its own.
    n_workers = 1 if job["gpu"] else job["cores"]
    cluster = distributed.LocalCluster(
        n_workers=n_workers, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
    )
    with cluster, distributed.Client(cluster) as client:
        cluster.client = client
        client.run(use_width, job["widths"])
        distributed_segmentation.distributed_eval(
            input_zarr=zarr.open(job["zarr"], mode="r"),
            blocksize=(job["block"], job["block"]),
            write_path=job["result"],
            model_kwargs={"gpu": job["gpu"], "pretrained_model": job["weights"]},
            eval_kwargs=eval_options(job),
            cluster=cluster,
        )


class CellposeOfThread:
    """A function of a tile for patchworks: one Cellpose model per thread, built once."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.kept = threading.local()

    def __call__(self, tile: np.ndarray) -> np.ndarray:
        from cellpose import models

        if not hasattr(self.kept, "model"):
            self.kept.model = models.CellposeModel(gpu=False, pretrained_model=self.job["weights"])
        return np.asarray(self.kept.model.eval(tile, **eval_options(self.job))[0]).astype(np.int32)


def patchworks(job: dict[str, Any]) -> None:
    """patchworks with Cellpose as its function, joining what overlaps as it advises for touching cells."""
    import dask.array
    import torch
    import torch.utils.mkldnn
    from patchworks import tile_process

    torch.set_num_threads(1)  # tiles run side by side
    # Threads that convert a network for the first time at the same moment break each other's in torch.
    layers = torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1), torch.nn.Linear(1, 1)
    torch.utils.mkldnn.to_mkldnn(torch.nn.Sequential(*layers).eval())
    use_width(job["widths"])
    tile_process(
        dask.array.from_zarr(job["zarr"]),
        CellposeOfThread(job),
        tile_shape=(job["block"], job["block"]),
        overlap=HALO_DIAMETERS * job["diameter"],
        max_workers=job["cores"],
        stitch="iou",
        write_to=job["result"],
        progress=False,
    )


PEERS = {"untiled": untiled, "contrib": contrib, "patchworks": patchworks}

if __name__ == "__main__":
    PEERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
