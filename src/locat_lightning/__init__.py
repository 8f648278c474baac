"""LocAtViT (ICLR 2026) in PyTorch Lightning: Vision Transformers whose patch features are good."""

from importlib.metadata import version

__version__ = version("locat-lightning")
