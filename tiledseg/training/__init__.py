"""Training: from images with labels to a model file, for users and for the default model alike.

`pairs` reads images with their labels, `views` makes what the network is shown of them, `fit` adapts the network and
its size model, `tune` does all of it for a user.
"""

from .tune import TrainingReport, train

__all__ = ["TrainingReport", "train"]
