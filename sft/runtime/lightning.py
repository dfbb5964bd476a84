"""The way to Lightning: everything that this project takes from it, imported without the whole of torchmetrics.

Other modules import Lightning from here, so that the stand-in for torchmetrics is always there before it.
"""

# ruff: noqa: E402  (the stand-in goes first)

from __future__ import annotations

from sft.runtime import torchmetrics_on_demand

torchmetrics_on_demand.install()

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy

__all__ = [
    "Callback",
    "ClusterEnvironment",
    "DDPStrategy",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
    "seed_everything",
]
