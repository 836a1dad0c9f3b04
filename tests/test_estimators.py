"""The estimator: unbiased, of the variance that theory gives, from a counter, and never touching a parameter."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ARCHITECTURES, build, estimate, examples
from xgblora import Base, LayerSubset, OptionLoss, attach
from xgblora.adapters import linear
from xgblora.base.prefix import Prefix
from xgblora.data.batch import build_batch
from xgblora.learn import estimators
from xgblora.learn.estimators import Backprop, Estimate, Key, TwoSided, split_batch
from xgblora.randomness import Stream, generator

DIMENSIONS, EXAMPLES = 6, 4


class Quadratic:
    """l_i(theta) = 1/2 theta' H_i theta + c_i' theta: gradients and probe losses are known in closed form."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        root = torch.randn(EXAMPLES, DIMENSIONS, DIMENSIONS, generator=draw)
        self.H = root @ root.transpose(1, 2) / DIMENSIONS
        self.c = torch.randn(EXAMPLES, DIMENSIONS, generator=draw)
        self.theta = torch.randn(DIMENSIONS, generator=draw)

    def gradients(self) -> Tensor:
        """(examples, d)"""
        return self.H @ self.theta + self.c

    def losses(self, z: Tensor, probes: Tensor) -> Tensor:
        points = self.theta + probes @ z
        example = torch.arange(len(points)) % EXAMPLES
        curved = torch.einsum("ni,nij,nj->n", points, self.H[example], points) / 2
        return curved + (points * self.c[example]).sum(1)


def draws(first: int, count: int) -> list[torch.Generator]:
    return [generator(0, Stream.DIRECTION, first + i) for i in range(count)]


def of_quadratic(problem: Quadratic, draw: list[torch.Generator], eps: float, directions: Any) -> tuple[Tensor, ...]:
    """Loss, gradient and projected gradients."""
    return TwoSided(eps, directions=directions).estimate(problem.losses, DIMENSIONS, EXAMPLES, draw)


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_mean_and_variance_on_a_quadratic(directions: str) -> None:
    """E = the gradient; trace of the covariance = (d + 1) |g|^2 shared, (d + 1)/B mean |g_i|^2 per example (d + 1
    because E|z|^2 z z' = (d + 2) I for Gaussian z, less the squared mean)."""
    problem, count = Quadratic(), 20000
    estimates = torch.stack([of_quadratic(problem, draws(i, 1), 1e-2, directions)[1] for i in range(count)]).double()
    gradients = problem.gradients().double()
    gradient = gradients.mean(0)
    if directions == "shared":
        variance = (DIMENSIONS + 1) * gradient.square().sum()
    else:
        variance = (DIMENSIONS + 1) * gradients.square().sum(1).mean() / EXAMPLES
    error = (estimates.mean(0) - gradient).norm()
    assert error < 4 * math.sqrt(variance / count)
    assert estimates.var(0).sum() == pytest.approx(variance.item(), rel=0.05)


def test_two_sided_differences_have_no_second_order_error() -> None:
    """On a quadratic g = z'grad exactly, for any eps: a one-sided difference would be off by eps z'Hz / 2."""
    problem = Quadratic()
    _, _, projected = of_quadratic(problem, draws(7, 1), 0.5, "shared")
    z = torch.randn(1, DIMENSIONS, generator=draws(7, 1)[0])[0]
    assert projected.item() == pytest.approx((z @ problem.gradients().mean(0)).item(), rel=1e-4)


def test_several_perturbations_average_g_times_z() -> None:
    """mean(g_i z_i), not mean(g) mean(z)."""
    problem = Quadratic()
    single = [of_quadratic(problem, draws(i, 1), 1e-2, "shared") for i in range(3)]
    loss, gradient, projected = of_quadratic(problem, draws(0, 3), 1e-2, "shared")
    losses, gradients, all_projected = zip(*single, strict=True)
    torch.testing.assert_close(gradient, torch.stack(gradients).mean(0))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert torch.equal(projected, torch.cat(all_projected))


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_the_loss_is_the_mean_of_both_probes(directions: str) -> None:
    def losses(z: Tensor, probes: Tensor) -> Tensor:
        return torch.where(probes.sum(1) > 0, 3.0, 5.0)

    assert TwoSided(1e-2, directions=directions).estimate(losses, 2, EXAMPLES, draws(0, 1))[0] == 4


@pytest.mark.parametrize(
    ("directions", "packed"),
    [
        ("shared", False),
        ("per_example", True),
        pytest.param("shared", True, marks=pytest.mark.soak),
        pytest.param("per_example", False, marks=pytest.mark.soak),
    ],
)
def test_mean_on_a_model_is_the_autograd_gradient(directions: str, packed: bool) -> None:
    """Cosine with the autograd gradient after n draws: n / (n + variance ratio), so near 1 for many."""
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, target_modules=r".*layers\.1\..*v_proj")
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05)
    batch = build_batch(examples(4), packed)
    OptionLoss()(model, batch).mean().backward()
    wanted = torch.empty(adapters.size)
    for layer, a, b in adapters.slices:
        wanted[a], wanted[b] = layer.lora_A.grad.flatten(), layer.lora_B.grad.T.flatten()
    count = 1500
    total = torch.zeros(adapters.size)
    for step in range(count):
        total += estimate(adapters, batch, step=step, directions=directions).gradient
    mean = total / count
    # The mean's squared error is at most about (d + 1) / count of |g|^2 (shared); per example depends on the data.
    assert torch.cosine_similarity(mean, wanted, dim=0) > 0.95
    assert mean @ wanted / (wanted @ wanted) == pytest.approx(1, abs=0.1)


def test_per_example_directions_have_less_variance_on_a_model() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model)
    batch = build_batch(examples(16))

    def spread(directions: str) -> float:
        gradients = [estimate(adapters, batch, step=step, directions=directions).gradient for step in range(100)]
        return torch.stack(gradients).var(0).sum().item()

    assert spread("per_example") < spread("shared")


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_parameters_and_the_global_generator_are_untouched(directions: str) -> None:
    adapters = attach(build(ARCHITECTURES["opt"]))
    before = [p.clone() for p in adapters.parameters()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    batch = build_batch(examples(3))
    settings: dict[str, Any] = {"seed": 1, "perturbations": 2, "directions": directions}
    first = estimate(adapters, batch, step=2, **settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, b) for p, b in zip(adapters.parameters(), before, strict=True))
    torch.manual_seed(6)
    again = estimate(adapters, batch, step=2, **settings)
    assert torch.equal(first.gradient, again.gradient)
    other = estimate(adapters, batch, step=3, **settings)
    assert not torch.equal(first.gradient, other.gradient)


@pytest.mark.parametrize("subset", [None, LayerSubset(1, "top")])
def test_backpropagation_is_autograds_gradient(subset: LayerSubset | None) -> None:
    """Laid out like a direction, for the layers that train alone, times the share."""
    adapters = attach(build(ARCHITECTURES["llama"]), rank=2, layers=subset)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05)
    batch = build_batch(examples(4))
    mean = OptionLoss()(adapters.base, batch).mean()
    mean.backward()
    wanted = torch.empty(adapters.size)
    for layer, a, b in adapters.slices:
        wanted[a], wanted[b] = layer.lora_A.grad.flatten(), layer.lora_B.grad.T.flatten()
    result = Backprop()(adapters, OptionLoss(), batch, Key(0, 0), 0.25)
    torch.testing.assert_close(result.gradient, wanted / 4)
    assert result.loss == pytest.approx(mean.item(), rel=1e-6)
    assert result.cost.passes == 1


def test_gradients_reach_the_parameters_they_belong_to() -> None:
    """A flat gradient equal to one layer's direction lands in that layer alone."""
    adapters = attach(build(ARCHITECTURES["llama"]), rank=2)
    layer, a, b = adapters.slices[2]
    flat = torch.zeros(adapters.size)
    flat[a], flat[b] = torch.arange(a.stop - a.start) + 1.0, torch.arange(b.stop - b.start) + 1.0
    adapters.accumulate_gradient(flat)
    adapters.accumulate_gradient(flat)
    assert torch.equal(layer.lora_A.grad, 2 * flat[a].view(2, -1))
    assert torch.equal(layer.lora_B.grad, 2 * flat[b].view(2, -1).T)
    others = [other for other, _, _ in adapters.slices if other is not layer]
    assert not any(other.lora_A.grad.any() or other.lora_B.grad.any() for other in others)


@pytest.mark.parametrize("directions", ["shared", "per_example"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("windows", [True, False])
def test_large_batches_in_parts_give_the_same_estimate(
    directions: str, packed: bool, windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several forwards of a few examples, several pieces of a forward: all as in one."""
    base = Base(build(ARCHITECTURES["llama"]), packed)
    adapters = attach(base, layers=LayerSubset(1, "top") if windows else None)
    batch = base.batch(examples(13, [[5], [9, 4]]))

    def result() -> Estimate:
        prefix = Prefix(adapters.model, 10**6) if windows else None
        return estimate(adapters, batch, prefix=prefix, perturbations=2, directions=directions)

    expected = result()
    monkeypatch.setattr(estimators, "FORWARD_TOKENS", 150)
    monkeypatch.setattr(linear, "PIECE", 11)
    assert len(split_batch(batch)) > 2
    other = result()
    torch.testing.assert_close(other.projected, expected.projected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.gradient, expected.gradient, rtol=1e-3, atol=1e-4)
    assert other.loss == pytest.approx(expected.loss, rel=1e-5)
