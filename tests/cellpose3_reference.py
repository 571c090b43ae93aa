"""Runs in an environment with cellpose 3.1.1.3: makes model files and says what Cellpose makes of them.

    python cellpose3_reference.py FOLDER

Writes for "random" and "trained" the state dict `<name>`, its size model `<name>_size.npy` where there is one, and
`<name>.npz` with 20 tiles, the network's outputs and styles on them, and the diameters that follow. ``inputs.npz``
holds a picture in colours and what networks are shown of it, for channels in Cellpose's numbers, inverted or not.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from cellpose import models, train, transforms
from cellpose.resnet_torch import CPnet

N_TILES = 20
SIDE = 224
WIDTHS = [2, 32, 64, 128, 256]
CHANNELS = ((0, 0), (1, 0), (2, 1), (3, 2))


def discs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of two channels, and the labels of its discs."""
    y, x = np.mgrid[:SIDE, :SIDE]
    labels = np.zeros((SIDE, SIDE), np.int32)
    for label, (cy, cx) in enumerate(rng.uniform(20, SIDE - 20, (12, 2)), 1):
        labels[(y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(8, 16) ** 2] = label
    image = np.stack([labels > 0, labels % 2]).astype(np.float32) * 100 + rng.normal(10, 3, (2, SIDE, SIDE))
    return image.astype(np.float32), labels


def answers(net: CPnet, size_file: Path | None, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What the network, and the size model if there is one, say of some tiles."""
    contrast = np.geomspace(0.05, 5, N_TILES)[:, None, None, None]
    tiles = (contrast * rng.normal(0.4, 0.5, (N_TILES, 2, SIDE, SIDE))).astype(np.float32)
    net.eval()
    with torch.no_grad():
        output, style = (part.numpy() for part in net(torch.from_numpy(tiles))[:2])
    found = {"tiles": tiles, "output": output, "style": style}
    if size_file is not None:
        size = models.SizeModel(models.CellposeModel(gpu=False, pretrained_model=""), pretrained_size=str(size_file))
        found["diameters"] = np.array([size._size_estimation(one) for one in style])
    return found


def shown(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A picture in colours, and what a network is shown of it."""
    colours = rng.integers(0, 255, (SIDE, SIDE, 3)) * np.array([1.0, 0.5, 0.2])
    found = {"colours": colours.astype(np.uint8)}
    for first, second in CHANNELS:
        image = transforms.convert_image(found["colours"], [first, second], channel_axis=-1)
        for invert in (False, True):
            normalised = transforms.normalize_img(image.copy(), invert=invert)
            found[f"{first}-{second}-{invert}"] = np.moveaxis(normalised, -1, 0)
    return found


def main(folder: Path) -> None:
    """Make the files."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    net = CPnet(WIDTHS, nout=3, sz=3, mkldnn=False, diam_mean=30.0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    net.save_model(str(folder / "random"))
    np.savez(folder / "random.npz", **answers(net, None, rng))

    np.savez(folder / "inputs.npz", **shown(rng))
    images, labels = zip(*[discs(rng) for _ in range(6)], strict=True)
    given = {"train_data": list(images), "train_labels": list(labels), "channels": [1, 2], "channel_axis": 0}
    train.train_seg(net, **given, n_epochs=2, save_path=folder, model_name="trained", SGD=False, learning_rate=1e-3)
    (folder / "models" / "trained").rename(folder / "trained")
    size = train.train_size(net, str(folder / "trained"), **given, n_epochs=2)
    if not (folder / "trained_size.npy").exists():
        np.save(folder / "trained_size.npy", size)
    np.savez(folder / "trained.npz", **answers(net, folder / "trained_size.npy", rng))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
