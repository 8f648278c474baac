"""Self-supervision: a file for each method, and what they share.

Every file here is imported, so that a config finds a new method by the name of its class.
"""

from importlib import import_module
from pkgutil import iter_modules

from locat_lightning.methods.adaptation import LocalityAdaptation
from locat_lightning.methods.dino import Dino
from locat_lightning.methods.dinov2 import Dinov2
from locat_lightning.methods.distillation import Distillation
from locat_lightning.methods.ibot import Ibot
from locat_lightning.methods.mae import Mae
from locat_lightning.methods.selfpatch import SelfPatch
from locat_lightning.methods.simmim import SimMim

__all__ = ["Dino", "Dinov2", "Distillation", "Ibot", "LocalityAdaptation", "Mae", "SelfPatch", "SimMim"]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
