"""Forward-only fine-tuning of causal language models with LoRA and XGBLoRA."""

from xgblora.adapters import Adapters, LayerSubset, Ledger, attach, load_adapters, start_from
from xgblora.base import Base, load_model
from xgblora.config import RunConfig
from xgblora.data.batch import Batch, Example
from xgblora.errors import DivergedError, XgbloraError
from xgblora.learn.evaluate import evaluate, evaluate_stages
from xgblora.learn.losses import OptionLoss, TextLoss
from xgblora.learn.predictor import Predictor, predict
from xgblora.learn.rewards import Reward, length_penalised, load_reward
from xgblora.tasks import encode, get_task, load_splits, load_task, sample
from xgblora.training import Trainer

__all__ = [
    "Adapters",
    "Base",
    "Batch",
    "DivergedError",
    "Example",
    "LayerSubset",
    "Ledger",
    "OptionLoss",
    "Predictor",
    "Reward",
    "RunConfig",
    "TextLoss",
    "Trainer",
    "XgbloraError",
    "attach",
    "encode",
    "evaluate",
    "evaluate_stages",
    "get_task",
    "length_penalised",
    "load_adapters",
    "load_model",
    "load_reward",
    "load_splits",
    "load_task",
    "predict",
    "sample",
    "start_from",
]
