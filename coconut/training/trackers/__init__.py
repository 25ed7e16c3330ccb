"""Trackers of experiments: TensorBoard, Weights & Biases, MLflow, and somebody's own."""

# Imported to be registered; what they need is imported where a run uses it.
from coconut.training.trackers import mlflow, tensorboard, wandb

__all__ = ["mlflow", "tensorboard", "wandb"]
