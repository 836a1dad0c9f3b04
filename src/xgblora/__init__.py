"""Forward-only fine-tuning of causal language models with LoRA and XGBLoRA."""

from xgblora.adapters import Adapters, LayerSubset, attach
from xgblora.boosters import Ledger, load_adapters, start_from
from xgblora.config import RunConfig
from xgblora.errors import DivergedError, XgbloraError
from xgblora.evaluation import evaluate, evaluate_stages, predict
from xgblora.models import load_model
from xgblora.packing import Example
from xgblora.rewards import Reward, length_penalised, load_reward
from xgblora.tasks import encode, get_task, load_splits, load_task, sample
from xgblora.trainer import Trainer

__all__ = [
    "Adapters",
    "DivergedError",
    "Example",
    "LayerSubset",
    "Ledger",
    "Reward",
    "RunConfig",
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
