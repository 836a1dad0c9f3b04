"""Gradients with layers that are computed again: the same numbers, less memory."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from conftest import ARCHITECTURES, build, examples, train
from xgblora import Adapters, Base, LayerSubset, OptionLoss, attach
from xgblora.base.checkpointing import checkpointed
from xgblora.base.prefix import Prefix
from xgblora.learn.estimators import Backprop, Key

OPTIONS = [[5], [9, 4]]


def gradients(adapters: Adapters, turn_back: Callable[[Tensor], None] = Tensor.backward) -> list[Tensor]:
    """The gradient of every A and B; ``turn_back`` goes backward from the loss, when the forward is long over."""
    adapters.drop_gradient()
    turn_back(OptionLoss()(adapters.base, adapters.base.batch(examples(5, OPTIONS))).mean())
    return [parameter.grad.clone() for parameter in adapters.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_stay(architecture: PreTrainedConfig, packed: bool, randomise) -> None:
    adapters = attach(Base(build(architecture), packed))
    randomise(adapters)
    expected = gradients(adapters)
    with checkpointed(adapters.model):
        again = gradients(adapters)
    assert len(again) == len(expected) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, expected, strict=True))


def test_another_thread_may_go_backward(randomise) -> None:
    """On a GPU autograd computes layers again in a thread of its own, which knows nothing of packed rows."""
    adapters = attach(Base(build(ARCHITECTURES["llama"]), packed=True))
    randomise(adapters)
    expected = gradients(adapters)

    def elsewhere(loss: Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    with checkpointed(adapters.model):
        again = gradients(adapters, elsewhere)
    assert [torch.equal(mine, theirs) for mine, theirs in zip(again, expected, strict=True)] == [True] * len(expected)


def test_only_what_enters_a_layer_is_kept(randomise) -> None:
    adapters = attach(Base(build(ARCHITECTURES["llama"]), packed=True))
    randomise(adapters)
    batch = adapters.base.batch(examples(5, OPTIONS))

    def kept(checkpoints: bool) -> int:
        """Bytes that the way back needs of activations."""
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            checkpointed(adapters.model) if checkpoints else nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            loss = OptionLoss()(adapters.base, batch)
            assert loss.requires_grad
        return sum(held.values())

    assert kept(True) < kept(False) / 2


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_training_learns_the_same(name: str, tmp_path: Path) -> None:
    """transformers renamed its flag: both names work, and mean ours, also on models that know nothing of it."""
    plain, losses = train(tmp_path / "plain", trainer="regular", lora=True)
    trainer, again = train(tmp_path / "checkpointed", trainer="regular", lora=True, **{name: True})
    assert again == losses
    for mine, theirs in zip(trainer.adapters.parameters(), plain.adapters.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [trainer.method.estimator.checkpoints, plain.method.estimator.checkpoints] == [True, False]
    assert not trainer.args.activation_checkpointing  # transformers' own, which would do nothing here


def test_nothing_goes_back_below_the_lowest_layer_that_trains(randomise) -> None:
    adapters = attach(Base(build(ARCHITECTURES["llama"]), packed=True), layers=LayerSubset(1, "top"))
    randomise(adapters)
    below, above = adapters.base.layers.values()
    prefix = Prefix(adapters.model, 10**9)
    calls: list[tuple[bool, bool]] = []
    below.register_forward_hook(lambda m, args, out: calls.append((False, out.requires_grad)))
    above.register_forward_hook(lambda m, args, out: calls.append((True, out.requires_grad)))
    batch = adapters.base.batch(examples(5, OPTIONS))
    whole = Backprop()(adapters, OptionLoss(), batch, Key(0, 0))
    calls.clear()
    for _ in range(2):
        entered = Backprop(checkpoints=True, prefix=prefix)(adapters, OptionLoss(), batch, Key(0, 0))
        torch.testing.assert_close(entered.gradient, whole.gradient, rtol=1e-4, atol=1e-6)
    # Twice to see that forwards can start above it, then for the batch, the second time from memory.
    assert calls.count((False, False)) == 3
    assert (False, True) not in calls
