"""Training a split network under a defense, and measuring it."""

from cem_fast.training.loop import augment, clean_features, correctness, evaluate_accuracy, observer, train

__all__ = ["augment", "clean_features", "correctness", "evaluate_accuracy", "observer", "train"]
