"""What a training minimises, and what judges it."""

from xgblora.config import RunConfig
from xgblora.learn.losses import AnswerLoss, FunctionLoss, Loss, Objective, OptionLoss, TextLoss
from xgblora.learn.rewards import Reward


def loss_of(config: RunConfig, objective: Objective | Loss | None) -> Loss:
    """What training minimises: ``objective``, where there is one; else what the configuration says."""
    if objective is None:
        return _likelihood(config)
    return objective if isinstance(objective, Loss) else FunctionLoss(objective)


def judges_of(config: RunConfig, loss: Loss) -> tuple[AnswerLoss, AnswerLoss]:
    """The loss that evaluations report, and that of the development rows on the way.

    On the way answers are written only where something depends on them: writing takes most of an evaluation's time.
    """
    if isinstance(loss, AnswerLoss):
        judge: AnswerLoss = loss
    elif isinstance(loss, Reward) and loss.writer is not None:
        judge = TextLoss(loss.writer)
    else:
        judge = _likelihood(config)
    decides = isinstance(loss, Reward) or str(config.metric_for_best_model).endswith("accuracy")
    return judge, judge if decides or judge.writer is None else TextLoss()


def _likelihood(config: RunConfig) -> AnswerLoss:
    return TextLoss() if config.train_as_classification is False else OptionLoss()
