"""LocAtViT (ICLR 2026) in PyTorch Lightning: Vision Transformers whose patch features are good.

Importing this registers the paper's models with timm: `timm.create_model("locatvit_tiny")`.
"""

from importlib.metadata import version

from locat_lightning.backbones import registry as registry
from locat_lightning.backbones.locate import add_locat

__all__ = ["add_locat"]
__version__ = version("locat-lightning")
