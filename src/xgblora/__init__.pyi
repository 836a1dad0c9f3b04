"""What `import xgblora` offers; each name is imported when it is first used."""

from .adapters import Adapters, LayerSubset, Ledger, attach, load_adapters, start_from
from .base import Base, load_model
from .config import RunConfig
from .data.batch import Batch, Example
from .errors import DivergedError, XgbloraError
from .group import join
from .learn.base_score import add_base_score
from .learn.evaluate import evaluate, evaluate_stages
from .learn.fitted.writers import last_writers, residual_writers
from .learn.losses import OptionLoss, TextLoss
from .learn.predictor import Prediction, Predictor, predict
from .learn.rewards import Reward, length_penalised, load_reward
from .runs.finished import RunPredictor, load_run
from .tasks import encode, get_task, load_splits, load_task, sample
from .training import Trainer

__all__ = [
    "Adapters",
    "Base",
    "Batch",
    "DivergedError",
    "Example",
    "LayerSubset",
    "Ledger",
    "OptionLoss",
    "Prediction",
    "Predictor",
    "Reward",
    "RunConfig",
    "RunPredictor",
    "TextLoss",
    "Trainer",
    "XgbloraError",
    "add_base_score",
    "attach",
    "encode",
    "evaluate",
    "evaluate_stages",
    "get_task",
    "join",
    "last_writers",
    "length_penalised",
    "load_adapters",
    "load_model",
    "load_reward",
    "load_run",
    "load_splits",
    "load_task",
    "predict",
    "residual_writers",
    "sample",
    "start_from",
]
