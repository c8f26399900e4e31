"""Training of a split network under a defense, and measurements of it."""

from cem_fast.training.loop import Epoch, augment, train
from cem_fast.training.measure import clean_features, correctness, evaluate_accuracy
from cem_fast.training.observer import Observer, observer

__all__ = [
    "Epoch",
    "Observer",
    "augment",
    "clean_features",
    "correctness",
    "evaluate_accuracy",
    "observer",
    "train",
]
