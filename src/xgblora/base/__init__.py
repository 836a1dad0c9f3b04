"""The frozen language model: how it is loaded, what is asked of it, and how it runs fast."""

from xgblora.base.base import Base, Observation
from xgblora.base.load import load_model

__all__ = ["Base", "Observation", "load_model"]
