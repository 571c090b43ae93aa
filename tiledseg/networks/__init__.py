"""Networks: classes, weights and the registry of models.

`models` finds a model and describes it without importing torch; `runner` runs one.
"""
