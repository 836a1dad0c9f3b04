"""What Newton steps of a fit stand on: how a loss bends, landmarks, and a solver."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ARCHITECTURES, build, examples
from xgblora import Example, OptionLoss, TextLoss, attach
from xgblora.learn.fitted import activations
from xgblora.learn.fitted.activations import Forwards, Observed
from xgblora.learn.fitted.fit import fit
from xgblora.learn.fitted.kernel import Kernel, ridge_regression
from xgblora.learn.fitted.newton import conjugate_gradient
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.learn.losses import AnswerLoss, option_scores

MANY = [[5], [9], [13], [17], [21, 3], [25], [29], [33], [37, 2, 4], [41]]


def observed(rows: list[Example], loss: AnswerLoss) -> tuple[Forwards, Observed]:
    forwards = Forwards(attach(build(ARCHITECTURES["llama"]), 1, 16, ["o_proj"], xgblora=True), loss)
    with torch.no_grad():
        (seen,) = forwards.observe(rows)
    return forwards, seen


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options", [[[5], [9], [13]], [[5, 6], [9], [13, 14, 15]], MANY], ids=["words", "long", "many"]
)
def test_options_bend_as_gauss_and_newton_say(options: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """J^T (diag(q) - q q^T) J for each example, with J the scores' slopes."""
    monkeypatch.setattr("xgblora.learn.fitted.tail_loss.MOST_FACTORS", 10)
    forwards, seen = observed(examples(5, options), OptionLoss())
    outputs, moved = torch.linalg.qr(some(32, 2))[0].T.contiguous(), some(len(seen.hidden), 2, seed=1)
    loss = TailLoss(forwards, seen)
    with torch.no_grad():
        bend = loss.bend(seen.hidden, outputs, torch.Generator())
        ((batch, _),) = loss.parts
        torch.testing.assert_close(bend.slopes, loss.gradient(seen.hidden) @ outputs.T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bend.losses, loss(seen.hidden))

    def scores(f: Tensor) -> Tensor:
        return option_scores(forwards.base, forwards.tail(seen.hidden + f @ outputs), batch)

    nothing = torch.zeros_like(moved)
    chance = scores(nothing).detach().softmax(1)
    pushed = torch.autograd.functional.jvp(scores, nothing, moved)[1].detach()
    weighed = chance * (pushed - (chance * pushed).sum(1, keepdim=True))
    expected = torch.autograd.functional.vjp(scores, nothing, weighed)[1]
    torch.testing.assert_close(bend.curved(moved), expected, rtol=1e-3, atol=1e-5)


def test_of_many_options_some_show_how_the_loss_bends(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, seen = observed(examples(5, MANY), OptionLoss())
    outputs, moved = torch.eye(2, 32), some(len(seen.hidden), 2, seed=1)
    bends: dict[int, Tensor] = {}
    loss = TailLoss(forwards, seen)
    for most in (10, 8):
        monkeypatch.setattr("xgblora.learn.fitted.tail_loss.MOST_FACTORS", most)
        with torch.no_grad():
            draws = [loss.bend(seen.hidden, outputs, torch.Generator().manual_seed(seed)) for seed in range(20)]
        assert draws[0].factors.shape[1] == most
        bends[most] = torch.stack([bend.curved(moved) for bend in draws]).mean(0)
    assert (bends[8] - bends[10]).norm() < 0.2 * bends[10].norm()


@pytest.mark.parametrize("score_prompt", [False, True])
def test_text_bends_as_fishers_information_says(score_prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each position, the variance of the slope of a word's log-probability, in the share it has of the loss."""
    monkeypatch.setattr("xgblora.learn.fitted.tail_loss.SAMPLED", 400)
    rows = [Example(e.prompt, [[5, 6, 7], [9]], e.label, score_prompt) for e in examples(4, [[5], [9]])]
    forwards, seen = observed(rows, TextLoss())
    outputs, moved = torch.eye(2, 32), some(len(seen.hidden), 2, seed=1)
    loss = TailLoss(forwards, seen)
    with torch.no_grad():
        bend = loss.bend(seen.hidden, outputs, torch.Generator().manual_seed(0))
        torch.testing.assert_close(bend.slopes, loss.gradient(seen.hidden) @ outputs.T, rtol=1e-4, atol=1e-6)
    ((batch, _),) = loss.parts
    share = torch.zeros(len(seen.hidden))
    for number, label in enumerate(batch.label):
        (cell,) = (batch.option_cell == number * batch.max_options + label).nonzero()[0]
        of_option = batch.target_option == cell
        share.index_add_(0, batch.target_read[of_option], torch.full((int(of_option.sum()),), 1 / of_option.sum()))

    def logs(f: Tensor) -> Tensor:
        return forwards.base.logits(forwards.tail(seen.hidden + f @ outputs)).log_softmax(1)

    nothing = torch.zeros_like(moved)
    pushed = torch.autograd.functional.jvp(logs, nothing, moved)[1].detach()
    weighed = share[:, None] * logs(nothing).detach().exp() * pushed
    expected = torch.autograd.functional.vjp(logs, nothing, weighed)[1]
    assert (bend.curved(moved) - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("loss", [OptionLoss(), TextLoss()], ids=["options", "text"])
def test_landmarks_stand_for_all_positions(loss: AnswerLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of two layers of 32 are spanned by 100 positions, so the fit to 240 is that of all of them."""
    rows = examples(80, [[5, 6], [9, 7]])
    learners = []
    monkeypatch.setattr("xgblora.learn.fitted.newton.ENOUGH", 1e-6)
    monkeypatch.setattr("xgblora.learn.fitted.newton.MOST_STEPS", 60)
    monkeypatch.setattr(activations, "LANDMARKS", 100)
    for exact in (4096, 200):
        monkeypatch.setattr(activations, "ALL_LANDMARKS", exact)
        forwards, seen = observed(rows, loss)
        assert len(seen.hidden) == 240
        assert len(seen.inputs[0]) == (240 if exact == 4096 else 99)
        assert sorted(e.prompt for e in seen.examples) == sorted(e.prompt for e in rows)
        with torch.no_grad():
            learners.append((fit(seen, TailLoss(forwards, seen), 1.0), seen))
    (all_of_them, whole), (some_of_them, _) = learners
    torch.testing.assert_close(some_of_them.outputs, all_of_them.outputs, rtol=0.02, atol=0.02)
    change = some_of_them.at(whole)
    assert (change - all_of_them.change).norm() < 0.05 * all_of_them.change.norm()


def test_coordinates_reproduce_the_gram_matrix() -> None:
    inputs = [some(9, 4), some(9, 3, seed=1)]
    kernel = Kernel([x[:8] for x in inputs])
    coordinates = kernel.coordinates(inputs)
    torch.testing.assert_close(coordinates[:8], kernel.landmarks, rtol=1e-2, atol=1e-2)
    gram = sum((x * scale) @ (x * scale).T for x, scale in zip(inputs, kernel.scales, strict=True))
    torch.testing.assert_close(coordinates @ coordinates.T, gram, rtol=1e-2, atol=1e-2)  # 7 dimensions, 8 landmarks
    b = some(8, 2)
    along = sum(x @ a.T for x, a in zip(inputs, kernel.function(b), strict=True))
    torch.testing.assert_close(along, coordinates @ b, rtol=1e-2, atol=1e-2)


def test_ridge_regression_is_that_of_the_field() -> None:
    coordinates, values = some(20, 5), some(20, 3, seed=1)
    coefficients = torch.linalg.solve(coordinates.T @ coordinates + 0.7 * torch.eye(5), coordinates.T @ values)
    torch.testing.assert_close(ridge_regression(coordinates, values, 0.7), coordinates @ coefficients)


def test_conjugate_gradients_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgblora.learn.fitted.newton.LEFT", 1e-5)
    root: Any = some(6, 6)
    matrix, expected = root @ root.T + torch.eye(6), some(6, 2, seed=1)
    torch.testing.assert_close(
        conjugate_gradient(lambda x: matrix @ x, matrix @ expected, matrix.diagonal()[:, None].expand(6, 2)),
        expected,
        rtol=1e-3,
        atol=1e-3,
    )
