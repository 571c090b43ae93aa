"""A plugin of napari that segments what it shows; `napari.yaml` tells napari of it.

`widget` is the form; what it does is in `target` (what of a layer is segmented), `choices` (settings), `layers` (where
things lie in napari) and `background` (a thread).
"""
