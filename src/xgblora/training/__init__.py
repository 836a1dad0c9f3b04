"""Training: transformers' loop, with our step in it, and all that keeps a run whole."""

from xgblora.training.trainer import Trainer

__all__ = ["Trainer"]
