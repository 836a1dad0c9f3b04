"""Classifiers of the base's hidden states: what people use where a model need only choose. They write no text."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from xgblora.base import Base
from xgblora.base.states import last_states
from xgblora.data.batch import Example
from xgblora.errors import XgbloraError
from xgblora.learn.cost import Cost
from xgblora.learn.evaluate import Evaluation, accuracy

logger = logging.getLogger(__name__)

Kind = Literal["centroid", "probe"]

MOST_LAYERS = 12
"""Decoder layers that are tried, evenly spaced; the last one always."""

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse strengths of a probe's ridge penalty that are tried, on standardised states."""


@dataclass(frozen=True)
class Readout:
    """A classifier of the hidden state at the last word of a prompt."""

    base: Base
    layer: str
    """The decoder layer that leaves the hidden states."""
    classifier: Any
    on_dev: Evaluation
    """How good it is on the rows that chose it."""
    cost: Cost
    """What was forwarded to fit and to choose."""

    def evaluate(self, rows: Sequence[Example], progress: str | None = None) -> Evaluation:
        """What it answers to other rows, which have the options it was fitted to."""
        states, _ = last_states(self.base, rows, [self.layer], progress)
        return _evaluation(self.classifier, states[0], rows)


def fit_readout(
    base: Base, kind: Kind, train: Sequence[Example], dev: Sequence[Example], progress: str | None = None
) -> Readout:
    """Fit a classifier to hidden states of the base as it is.

    ``centroid`` takes the option whose training prompts' mean is nearest (hidden calibration, arXiv 2406.16535), in
    the layer that has the most dev rows right; ``probe`` is a logistic regression with a ridge penalty, layer and
    penalty those with the lowest dev loss.

    Args:
        base: The model.
        kind: Which classifier.
        train: What it is fitted to.
        dev: What chooses.
        progress: Name of a progress bar.

    Raises:
        XgbloraError: The options are not the same in every row, some option is never right, there are no dev rows, or
            scikit-learn is not installed.
    """
    _require_classes(train, dev)
    names = list(base.layers)
    count = min(MOST_LAYERS, len(names))
    layers = [names[round((place + 1) * len(names) / count) - 1] for place in range(count)]
    candidates = _classifiers(kind)
    states, tokens = last_states(base, [*train, *dev], layers, progress)
    labels = [example.label for example in train]
    best: tuple[float, Readout, str] | None = None
    for layer, of_layer in zip(layers, states, strict=True):
        for setting, classifier in candidates:
            fitted = copy.deepcopy(classifier).fit(of_layer[: len(train)].numpy(), labels)
            judged = _evaluation(fitted, of_layer[len(train) :], dev)
            badness = judged.loss if kind == "probe" else -judged.accuracy
            if best is None or badness < best[0]:
                cost = Cost(1, len(train) + len(dev), tokens)
                best = badness, Readout(base, layer, fitted, judged, cost), setting
    assert best is not None
    _, readout, setting = best
    logger.info("%s of %s%s: dev loss %.4f", kind.capitalize(), readout.layer, setting, readout.on_dev.loss)
    return readout


def _require_classes(train: Sequence[Example], dev: Sequence[Example]) -> None:
    options = {tuple(map(tuple, example.options)) for example in (*train, *dev)}
    if len(options) != 1:
        raise XgbloraError("--readout is for tasks with the same options in every row: leave it out")
    if not dev:
        raise XgbloraError("--readout chooses its layer on dev rows: give --num_dev")
    if missing := set(range(len(train[0].options))) - {example.label for example in train}:
        raise XgbloraError(
            f"--readout needs training rows of every option; of option {min(missing) + 1} there are none"
        )


def _classifiers(kind: Kind) -> list[tuple[str, Any]]:
    """Those to choose from, each with what tells it apart."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import NearestCentroid
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise XgbloraError('--readout needs scikit-learn: pip install "xgblora[probe]"') from error
    if kind == "centroid":
        return [("", make_pipeline(StandardScaler(), NearestCentroid(priors="uniform")))]
    return [
        (f", C = {C:g}", make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))) for C in PENALTIES
    ]


def _evaluation(classifier: Any, states: Tensor, rows: Sequence[Example]) -> Evaluation:
    probabilities = torch.from_numpy(classifier.predict_proba(states.numpy())).float()
    predictions = probabilities.argmax(1).tolist()
    of_label = probabilities[range(len(rows)), [row.label for row in rows]].clamp(min=1e-9)
    return Evaluation(
        accuracy(rows, predictions), -of_label.log().mean().item(), predictions, None, list(probabilities)
    )
