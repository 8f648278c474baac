"""LightningModules: what is trained, by which loss."""

from locat_lightning.tasks.classification import Classification

__all__ = ["Classification"]
