"""The form in napari: settings as in Cellpose's window, and buttons that run on what is visible or on all of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from napari.layers import Image, Shapes
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QSpinBox,
    QWidget,
)

from ..config import FlowsConfig, MasksConfig
from ..errors import SettingsError, TiledsegError
from ..networks.models import KNOWN_MODELS
from ..progress import Listener
from .background import Background, CancelledError
from .choices import GREY, IN_3D, STITCHED, VOLUMES, Choices, diameter_of_shapes_layer, region_of
from .layers import add_labels, axes_named, placement, shown, visible
from .target import Target, open_target
from .work import Labels, estimated, segmented

__all__ = ["SegmentWidget"]

STITCH_THRESHOLD = 0.25


class SegmentWidget(QWidget):
    """The form.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        Given by napari, which knows the argument by its name.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self._background = Background()
        self._background.progressed.connect(self._show_progress)
        self._background.ended.connect(self._end)
        self._then: Callable[[Any], None] = lambda _: None
        self.destroyed.connect(self._background.cancel)
        self._make_fields()
        self._make_buttons()
        self._lay_out()
        self.image.currentIndexChanged.connect(self._take_layer)
        self.axes.editingFinished.connect(self._take_layer)
        self.volume.currentTextChanged.connect(self._show_what_counts)
        self._rest()
        self.reset_choices()

    def _make_fields(self) -> None:
        """Everything that is chosen."""
        masks = MasksConfig()
        self.image, self.shapes = QComboBox(), QComboBox()
        self.axes = _tip(QLineEdit(), "one letter for each axis of the layer: t, c, z, y, x")
        self.axes.setPlaceholderText("e.g. zyx")
        self.model = _tip(QComboBox(), "a name, or the path of a model file")
        self.model.setEditable(True)
        self.model.addItems(list(KNOWN_MODELS))
        self.model.setCurrentText(FlowsConfig().model)
        self.channel = _tip(QComboBox(), "the channel to segment; grey is the mean of all")
        self.nuclear = _tip(QComboBox(), "channel of the nuclei, for models that were trained with one")
        self.diameter = _tip(_decimal(0, 100_000, 0.0), "pixels of the full-size image; 0 estimates it")
        self.diameter.setSpecialValueText("estimate")
        self.volume = _tip(QComboBox(), "how cells are sought in a volume")
        self.volume.addItems(list(VOLUMES))
        self.stitch = _tip(_decimal(0, 1, STITCH_THRESHOLD), "share by which cells of two planes overlap to be joined")
        self.resample = _tip(QCheckBox(), "follow the flows at full size: smooth outlines")
        self.resample.setChecked(masks.resample)
        self.match = _tip(_decimal(0, 100, masks.flow_threshold), "higher keeps more cells, 0 keeps all; not in 3D")
        self.probability = _tip(_decimal(-7, 100, masks.cellprob_threshold), "lower makes cells larger, and more")
        self.min_size = _tip(QSpinBox(), "smallest cell, pixels")
        self.min_size.setRange(0, 10_000_000)
        self.min_size.setValue(masks.min_size)
        self.output = _tip(QLineEdit(), "an OME-Zarr for the labels of the whole image; empty keeps them in memory")
        self.output.setPlaceholderText("in memory")
        self.restart = _tip(QCheckBox("discard an earlier run there"), "with the labels that it wrote")

    def _make_buttons(self) -> None:
        """Everything that is clicked, and what is told."""
        self.from_image = _button("From image", self._estimate)
        self.from_shapes = _button("From shapes", self._measure_shapes)
        self.browse = _button("…", self._browse)
        self.run_visible = _button("Run on what is visible", functools.partial(self._run, only_visible=True))
        self.run_whole = _button("Run on the whole image", functools.partial(self._run, only_visible=False))
        self.cancel = _button("Cancel", self._background.cancel)
        self.progress, self.message = QProgressBar(), QLabel()
        self.message.setWordWrap(True)
        self.message.setTextFormat(Qt.TextFormat.PlainText)
        self.message.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)

    def _lay_out(self) -> None:
        form = QFormLayout(self)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.ExpandingFieldsGrow)
        for label, field in (
            ("Image", self.image),
            ("Axes", self.axes),
            ("Model", self.model),
            ("Channel", self.channel),
            ("Nuclear channel", self.nuclear),
            ("Diameter", _row(self.diameter, self.from_image)),
            ("Shapes layer", _row(self.shapes, self.from_shapes)),
            ("Volume", self.volume),
            ("Stitch threshold", self.stitch),
            ("Resample", self.resample),
            ("Model match threshold", self.match),
            ("Cell probability threshold", self.probability),
            ("Smallest cell", self.min_size),
            ("Save labels to", _row(self.output, self.browse)),
            ("Restart", self.restart),
        ):
            form.addRow(label, field)
        for field in (self.run_visible, self.run_whole, _row(self.progress, self.cancel), self.message):
            form.addRow(field)
        self._form = form

    def reset_choices(self, _: Any = None) -> None:
        """Offer the layers that there are; napari calls this when they change."""
        for box, kind in ((self.image, Image), (self.shapes, Shapes)):
            layers = [layer for layer in self._viewer.layers if isinstance(layer, kind)]
            before = box.currentData()
            box.blockSignals(True)
            box.clear()
            for layer in layers:
                box.addItem(layer.name, layer)
            box.setCurrentIndex(layers.index(before) if before in layers else len(layers) - 1)
            box.blockSignals(False)
            if box is self.image and box.currentData() is not before:
                self._take_layer()
        self._show_what_counts()

    def _take_layer(self, _: Any = None) -> None:
        """Offer the channels of the layer, and a place for its labels."""
        self.message.clear()
        target = self._target_or_message()
        channels = target.channels if target is not None else ()
        self.channel.clear()
        self.channel.addItem("as the model takes them", None)
        self.nuclear.clear()
        self.nuclear.addItem("none", None)
        for number, name in enumerate(channels):
            for box in (self.channel, self.nuclear):
                box.addItem(name if name == str(number) else f"{number}: {name}", number)
        if len(channels) > 1:
            self.channel.addItem(GREY, GREY)
        if target is not None and target.channel is not None:
            self.channel.setCurrentIndex(self.channel.findData(target.channel))
        self.output.setText(target.place_for_labels if target is not None else "")
        self._show_what_counts()

    def _show_what_counts(self, _: Any = None) -> None:
        """Show the fields that mean something for the layer."""
        layer = self.image.currentData()
        target = self._target_or_message() if layer is not None else None
        is_volume = target is not None and target.is_volume
        is_named = layer is None or axes_named(layer) is not None or (target is not None and not self.axes.text())
        self._show_row(self.axes, not is_named)
        self._show_row(self.volume, is_volume)
        self._show_row(self.stitch, is_volume and self.volume.currentText() == STITCHED)
        self._show_row(self.match, not (is_volume and self.volume.currentText() == IN_3D))
        for box in (self.channel, self.nuclear):
            self._show_row(box, target is not None and len(target.channels) > 1)

    def _show_row(self, field: QWidget, is_shown: bool) -> None:
        for part in (field, self._form.labelForField(field)):
            if part is not None:
                part.setVisible(is_shown)

    def _target_or_message(self) -> Target | None:
        """The layer that is chosen, opened; None, with the reason as the message, if that cannot be."""
        try:
            return self._target()
        except TiledsegError as error:
            self._tell(str(error))
            return None

    def _target(self) -> Target:
        layer = self.image.currentData()
        if layer is None:
            raise SettingsError("there is no image; open one in napari, then choose it here.")
        return open_target(layer, self.axes.text().strip())

    def chosen(self) -> Choices:
        """What the form says."""
        return Choices(
            model=self.model.currentText().strip(),
            channel=self.channel.currentData(),
            nuclear_channel=self.nuclear.currentData(),
            diameter=self.diameter.value(),
            volume=self.volume.currentText(),
            stitch_threshold=self.stitch.value(),
            resample=self.resample.isChecked(),
            flow_threshold=self.match.value(),
            cellprob_threshold=self.probability.value(),
            min_size=self.min_size.value(),
        )

    def _run(self, only_visible: bool) -> None:
        """Segment, and add what is found to the viewer."""
        with self._saying_errors():
            target, choices, layer = self._target(), self.chosen(), self.image.currentData()
            axes, volume = target.layer_axes, choices.volume
            on_canvas = visible(self._viewer, layer, axes) if only_visible else None
            bounds = region_of(target, volume, shown(self._viewer, layer, axes), on_canvas)
            output = None if only_visible else self.output.text().strip() or None
            starts = {axis: start for axis, (start, _) in bounds.items()}

            def add(found: Labels) -> None:
                add_labels(self._viewer, name, found.levels, placement(layer, axes, found.axes, starts))
                self._tell(found.text)

            name = f"{layer.name} cells"
            restart = self.restart.isChecked() and output is not None
            settings = choices.settings(target)
            self._begin(lambda listener: segmented(listener, target, bounds, settings, output, restart), add)

    def _estimate(self) -> None:
        """Estimate the diameter from the image."""
        with self._saying_errors():
            target, settings = self._target(), self.chosen().for_estimate()
            self._begin(lambda listener: estimated(listener, target, settings), self._take_diameter)

    def _measure_shapes(self) -> None:
        """Take the diameter from drawn shapes."""
        with self._saying_errors():
            drawn, image = self.shapes.currentData(), self.image.currentData()
            if drawn is None or image is None:
                raise SettingsError("there is no shapes layer, or no image; add one and draw circles round some cells.")
            self._take_diameter(diameter_of_shapes_layer(drawn, image))

    def _take_diameter(self, diameter: float) -> None:
        self.diameter.setValue(diameter)
        self._tell(f"diameter {diameter:g} px")

    def _browse(self) -> None:
        """Choose where labels go."""
        path, _ = QFileDialog.getSaveFileName(self, "Save labels to", self.output.text(), "OME-Zarr (*.zarr)")
        if path:
            self.output.setText(path)

    def _begin(self, work: Callable[[Listener], Any], then: Callable[[Any], None]) -> None:
        """Do something in the background, then something in the window."""
        self._then = then
        for button in (self.run_visible, self.run_whole, self.from_image):
            button.setEnabled(False)
        self.cancel.setEnabled(True)
        self.progress.setRange(0, 0)
        self._tell("starting")
        self._background.start(work)

    def _show_progress(self, stage: str, done: int, total: int) -> None:
        self.progress.setRange(0, max(1, total))
        self.progress.setValue(done)
        self._tell(f"{stage}: {done} of {total}")

    def _end(self, future: Future[Any]) -> None:
        """The background is done; an error that is not one of ours goes on to napari, which shows it in full."""
        self._rest()
        with self._saying_errors():
            try:
                found = future.result()
            except CancelledError:
                self._tell("cancelled")
                return
            self._then(found)

    def _rest(self) -> None:
        """Nothing is under way."""
        for button in (self.run_visible, self.run_whole, self.from_image):
            button.setEnabled(True)
        self.cancel.setEnabled(False)
        self.progress.setRange(0, 1)
        self.progress.setValue(0)

    def _tell(self, text: str) -> None:
        self.message.setText(text)

    @contextlib.contextmanager
    def _saying_errors(self) -> Iterator[None]:
        """Show an error of ours as its sentence."""
        try:
            yield
        except TiledsegError as error:
            self._tell(str(error))


def _tip(field: Any, text: str) -> Any:
    field.setToolTip(text)
    return field


def _decimal(low: float, high: float, value: float) -> QDoubleSpinBox:
    """A field for a number."""
    field = QDoubleSpinBox()
    field.setRange(low, high)
    field.setSingleStep(0.1)
    field.setValue(value)
    return field


def _button(text: str, clicked: Callable[[], None]) -> QPushButton:
    button = QPushButton(text)
    # Qt would tell whether it is checked.
    button.clicked.connect(lambda: clicked())
    return button


def _row(*fields: QWidget) -> QWidget:
    """Fields side by side, the first of them as wide as can be."""
    row = QWidget()
    layout = QHBoxLayout(row)
    layout.setContentsMargins(0, 0, 0, 0)
    for number, field in enumerate(fields):
        layout.addWidget(field, 0 if number else 1)
    return row
