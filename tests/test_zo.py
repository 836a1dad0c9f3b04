"""The estimator: unbiased, of the variance that theory gives, from a counter, and never touching a parameter."""

import math

import pytest
import torch
from torch import Tensor

from conftest import ARCHITECTURES, build, examples
from xgblora import LayerSubset, attach, zo
from xgblora import adapters as adapters_module
from xgblora.lower_layers import LowerLayers
from xgblora.objectives import classification_loss
from xgblora.packing import build_batch
from xgblora.randomness import generator
from xgblora.zo import Estimate, direction_generators, estimate, estimate_batch

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

    def losses(self, z: Tensor, steps: Tensor) -> Tensor:
        points = self.theta + steps @ z
        example = torch.arange(len(points)) % EXAMPLES
        curved = torch.einsum("ni,nij,nj->n", points, self.H[example], points) / 2
        return curved + (points * self.c[example]).sum(1)


def draws(first: int, count: int) -> list[torch.Generator]:
    return [generator(0, "direction", first + i) for i in range(count)]


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_mean_and_variance_on_a_quadratic(directions: str) -> None:
    """E = the gradient; trace of the covariance = (d + 1) |g|^2 shared, (d + 1)/B mean |g_i|^2 per example (d + 1
    because E|z|^2 z z' = (d + 2) I for Gaussian z, less the squared mean)."""
    problem, count = Quadratic(), 20000
    found = torch.stack(
        [estimate(problem.losses, DIMENSIONS, EXAMPLES, draws(i, 1), 1e-2, directions).gradient for i in range(count)]
    ).double()
    each = problem.gradients().double()
    gradient = each.mean(0)
    if directions == "shared":
        variance = (DIMENSIONS + 1) * gradient.square().sum()
    else:
        variance = (DIMENSIONS + 1) * each.square().sum(1).mean() / EXAMPLES
    error = (found.mean(0) - gradient).norm()
    assert error < 4 * math.sqrt(variance / count)
    assert found.var(0).sum() == pytest.approx(variance.item(), rel=0.05)


def test_two_sided_differences_have_no_second_order_error() -> None:
    """On a quadratic g = z'grad exactly, for any eps: a one-sided difference would be off by eps z'Hz / 2."""
    problem = Quadratic()
    found = estimate(problem.losses, DIMENSIONS, EXAMPLES, draws(7, 1), 0.5, "shared")
    z = torch.randn(1, DIMENSIONS, generator=draws(7, 1)[0])[0]
    assert found.projected.item() == pytest.approx((z @ problem.gradients().mean(0)).item(), rel=1e-4)


def test_several_perturbations_average_g_times_z() -> None:
    """mean(g_i z_i), not mean(g) mean(z)."""
    problem = Quadratic()
    single = [estimate(problem.losses, DIMENSIONS, EXAMPLES, draws(i, 1), 1e-2, "shared") for i in range(3)]
    three = estimate(problem.losses, DIMENSIONS, EXAMPLES, draws(0, 3), 1e-2, "shared")
    torch.testing.assert_close(three.gradient, torch.stack([s.gradient for s in single]).mean(0))
    torch.testing.assert_close(three.loss, torch.stack([s.loss for s in single]).mean())
    assert torch.equal(three.projected, torch.cat([s.projected for s in single]))


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_the_loss_is_the_mean_of_both_probes(directions: str) -> None:
    def losses(z: Tensor, steps: Tensor) -> Tensor:
        return torch.where(steps.sum(1) > 0, 3.0, 5.0)

    assert estimate(losses, 2, EXAMPLES, draws(0, 1), 1e-2, directions).loss == 4


@pytest.mark.parametrize("directions", ["shared", "per_example"])
@pytest.mark.parametrize("packed", [True, False])
def test_mean_on_a_model_is_the_autograd_gradient(directions: str, packed: bool) -> None:
    """Cosine with the autograd gradient after n draws: n / (n + variance ratio), so near 1 for many."""
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, target_modules=r".*layers\.1\..*v_proj")
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05)
    batch = build_batch(examples(4), packed)
    classification_loss(model, batch).mean().backward()
    wanted = torch.empty(adapters.size)
    for layer, a, b in adapters.slices:
        wanted[a], wanted[b] = layer.lora_A.grad.flatten(), layer.lora_B.grad.T.flatten()
    count = 1500
    total = torch.zeros(adapters.size)
    for step in range(count):
        found = estimate_batch(
            adapters, classification_loss, batch, direction_generators(0, step, 0, 1), 1e-2, directions
        )
        total += found.gradient
    mean = total / count
    # The mean's squared error is at most about (d + 1) / count of |g|^2 (shared); per example depends on the data.
    assert torch.cosine_similarity(mean, wanted, dim=0) > 0.95
    assert mean @ wanted / (wanted @ wanted) == pytest.approx(1, abs=0.1)


def test_per_example_directions_have_less_variance_on_a_model() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model)
    batch = build_batch(examples(16))

    def spread(directions: str) -> float:
        found = [
            estimate_batch(
                adapters, classification_loss, batch, direction_generators(0, step, 0, 1), 1e-2, directions
            ).gradient
            for step in range(100)
        ]
        return torch.stack(found).var(0).sum().item()

    assert spread("per_example") < spread("shared")


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_parameters_and_the_global_generator_are_untouched(directions: str) -> None:
    adapters = attach(build(ARCHITECTURES["opt"]))
    before = [p.clone() for p in adapters.parameters()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    batch = build_batch(examples(3))
    draw = direction_generators(1, 2, 0, 2)
    first = estimate_batch(adapters, classification_loss, batch, draw, 1e-2, directions)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, b) for p, b in zip(adapters.parameters(), before, strict=True))
    torch.manual_seed(6)
    again = estimate_batch(adapters, classification_loss, batch, direction_generators(1, 2, 0, 2), 1e-2, directions)
    assert torch.equal(first.gradient, again.gradient)
    other = estimate_batch(adapters, classification_loss, batch, direction_generators(1, 3, 0, 2), 1e-2, directions)
    assert not torch.equal(first.gradient, other.gradient)


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
    adapters = attach(build(ARCHITECTURES["llama"]), layers=LayerSubset(1, "top") if windows else None)
    batch = build_batch(examples(13, [[5], [9, 4]]), packed)

    def found() -> Estimate:
        draw = direction_generators(0, 0, 0, 2)
        lower_layers = LowerLayers(adapters, 10**6) if windows else None
        return estimate_batch(adapters, classification_loss, batch, draw, 1e-2, directions, lower_layers)

    expected = found()
    monkeypatch.setattr(zo, "ROW_TOKENS", 150)
    monkeypatch.setattr(adapters_module, "PIECE", 11)
    assert len(zo._parts(batch)) > 2
    other = found()
    torch.testing.assert_close(other.projected, expected.projected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.gradient, expected.gradient, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.loss, expected.loss)
