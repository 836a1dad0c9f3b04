"""--torch_compile: the losses stay, and nothing is compiled anew for another batch, a merge or an evaluation."""

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import ARCHITECTURES, build, examples, option_scores, train
from xgblora import Base, OptionLoss, attach, residual_writers
from xgblora.base.compilation import compiled
from xgblora.data.batch import build_batch
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.boost import boost

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "cl")), reason="torch.compile needs a C++ compiler"
)


def test_a_run_compiles_one_graph_and_learns_the_same(tmp_path: Path) -> None:
    flags = {"xgblora": True, "xgblora_steps_per_iteration": 3, "max_steps": 10, "per_device_train_batch_size": 4}
    flags |= {"eval_strategy": "steps", "eval_steps": 5}
    _, expected = train(tmp_path / "eager", build(ARCHITECTURES["llama"]), **flags)
    torch._dynamo.reset()
    counters.clear()
    trainer, losses = train(tmp_path / "compiled", build(ARCHITECTURES["llama"]), torch_compile=True, **flags)
    assert len(trainer.ledger.boosters) == 3
    assert counters["stats"]["unique_graphs"] == 2  # the trial, and one for all layers, batches and boosters
    assert not counters["graph_break"]
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["opt", "gpt2", "mistral"])
def test_compiled_scores_are_the_eager_ones(name: str) -> None:
    model = build(ARCHITECTURES[name])
    attach(model)
    with torch.inference_mode():
        for size in (5, 3):
            batch = build_batch(examples(size, options=[[5], [9, 4]], seed=size))
            expected = option_scores(model, batch)
            with compiled(model):
                scores = option_scores(model, batch)
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(option_scores(model, batch), expected)  # eager again


def test_compiled_layers_are_looked_into_as_they_are() -> None:
    """Also after forwards that compiled them without anybody looking."""
    losses: dict[bool, list[float]] = {}
    for compile_layers in (False, True):
        base = Base(build(ARCHITECTURES["llama"]))
        adapters = attach(base, target_modules=residual_writers(base), xgblora=True)
        forwards = Forwards(adapters, OptionLoss())
        with base.without_gradients(compile_layers):
            fits = []
            for number in range(2):
                fits.append(boost(forwards, examples(60), examples(20, seed=1)))
                adapters.freeze_pair()
                adapters.new_pair(number + 1)
        losses[compile_layers] = [fit.after for fit in fits]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
