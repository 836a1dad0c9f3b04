"""Boosters fitted to pseudo-residuals (Friedman 2001, "Greedy function approximation: a gradient boosting machine").

A pair on a layer that writes to the residual stream adds scaling * B (A x) to it. If the layers above passed that on
unchanged, the final hidden state of position t, in front of the last norm and the head, would move by f_t u, with
f_t = sum over layers m of a_m . x_t^m and one direction u for all. So a booster is a weak learner in the sense of
gradient boosting, and forward passes are enough to fit it:

1. one forward over some examples keeps the inputs x_t^m of the layers and the final hidden states h_t where something
   is predicted;
2. the loss is a function of h_t through the norm and the head alone, which is cheap and differentiable: its negative
   gradient there is the pseudo-residual. The direction u is the first one of its reduced-rank ridge regression on the
   inputs (Izenman 1975);
3. f minimises the loss of h_t + f_t u plus a ridge penalty on the a_m: kernel logistic regression, solved in the
   examples' space. What the base itself says along u is mostly prejudice, written by its MLP layers: their pairs are
   a_m = -gamma W_m^T u, which takes the share gamma of it away, and gamma is fitted with the rest, unpenalised;
4. the layers above do change what passes through them (measured on SmolLM2: by a factor of 2, nearly the same for all
   examples), so the step length is found by forward passes over examples that no fit has seen: the shortest that is
   as good as the best within a standard error.

Nothing is propagated back through the model's layers, and no direction is random.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.adapters import AdaptedLinear, Adapters
from xgblora.errors import XgbloraError
from xgblora.lower_layers import LowerLayers
from xgblora.models import decoder_layers
from xgblora.objectives import hidden_scores, option_scores, score_losses
from xgblora.packing import Batch, Example, build_batch, read_hidden, split_by_tokens

PART_TOKENS = 1024
"""Tokens of one forward."""

MOST_READS = 2048
"""Predicting positions that one booster is fitted on at most: the fit takes time with the third power of them."""

ATTENTION_WRITERS = ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense")
"""How architectures call the layer that writes a block's attention to the residual stream."""

MLP_WRITERS = ("down_proj", "fc2", "mlp.c_proj", "mlp.dense_4h_to_h")
"""How they call the layer that writes a block's MLP."""

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "c_attn", "c_fc", "query_key_value")
"""Layers inside a block, which may be as wide as the residual stream and yet do not write to it."""


@dataclass(frozen=True)
class Boost:
    """What became of one booster.

    ``loss``: mean loss of the fitted examples before it. ``before`` and ``after``: mean loss of the examples that the
    fit did not see. ``step_length``: 0 where no step lowered it. ``passes``: forwards over the fitted or the kept
    examples; ``sequences`` and ``tokens``: what was in them.
    """

    loss: float
    before: float
    after: float
    step_length: float
    passes: int
    sequences: int
    tokens: int


def residual_writers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that write attention and, where they are known, MLPs to the residual stream, as targets.

    Raises :class:`XgbloraError` for an architecture that calls those of the attention otherwise.
    """
    names = [name for block in decoder_layers(model) for name, _ in model.get_submodule(block).named_modules()]
    attention, mlp = (
        [writer for writer in writers if any(_is_called(name, writer) for name in names)]
        for writers in (ATTENTION_WRITERS, MLP_WRITERS)
    )
    if not attention:
        raise XgbloraError(
            f"--recipe boost does not know which layers of {type(model).__name__} write to the residual stream: name "
            "them with --lora_target_modules"
        )
    return attention + mlp


def _is_called(name: str, writer: str) -> bool:
    return name == writer or name.endswith("." + writer)


def turned_down(adapters: Adapters) -> list[Callable[[Tensor], Tensor] | None]:
    """For each layer that trains: :func:`written_along` of it where it is only turned down, None where it is fitted.

    MLP layers are turned down, beside attention layers that are fitted; alone they are fitted themselves.
    """
    names = {layer: name for name, layer in adapters.layers.items()}
    own: list[Callable[[Tensor], Tensor] | None] = [
        partial(written_along, layer, dtype=adapters.model.dtype)
        if any(_is_called(names[layer], writer) for writer in MLP_WRITERS)
        else None
        for layer, _, _ in adapters.slices
    ]
    return own if None in own else [None] * len(own)


def written_along(layer: AdaptedLinear, output: Tensor, dtype: torch.dtype) -> Tensor:
    """W^T u, (in,) float32: what the base layer writes along ``output`` u (out,) for each unit of its inputs.

    The layer is asked, not its weight, so that a quantised one answers, too.
    """
    width = layer.in_features
    units = torch.zeros(min(width, PART_TOKENS), width, dtype=dtype, device=output.device)
    bias = layer.base_layer(units[:1]).float() @ output
    found = []
    for part in torch.arange(width, device=output.device).split(len(units)):
        rows = units[: len(part)].zero_().scatter_(1, part[:, None], 1)
        found.append(layer.base_layer(rows).float() @ output)
    return torch.cat(found) - bias


def require_writers(adapters: Adapters) -> None:
    """Raise :class:`XgbloraError` where ``adapters`` cannot hold fitted boosters."""
    if adapters.rank != 1:
        raise XgbloraError(f"a booster is a pair of rank 1, the adapters have rank {adapters.rank}")
    width = adapters.model.config.get_text_config().hidden_size
    for name, layer in adapters.layers.items():
        if layer.out_features != width or name.rpartition(".")[2] in READERS:
            raise XgbloraError(
                f"--recipe boost fits layers that write to the residual stream; {name} does not: leave out "
                "--lora_target_modules"
            )


@torch.no_grad()
def boost(
    adapters: Adapters,
    examples: Sequence[Example],
    searched: Sequence[Example],
    tail: "Tail",
    *,
    classification: bool = True,
    packed: bool = True,
    ridge: float = 3.0,
    step_length: float = 1.0,
    shrinkage: float = 1.0,
    lower_layers: LowerLayers | None = None,
) -> Boost:
    """Fit the pair in training of ``adapters`` (rank 1) to the pseudo-residuals of ``examples``, in place.

    ``searched``: examples that no booster was fitted on; they decide the step length, tried from ``step_length`` on.
    ``ridge``: see :func:`fit`. ``shrinkage`` multiplies the step at its end. Where no step lowers the loss, the pair
    stays zero. Raises :class:`XgbloraError` where there are too few examples or an adapted layer does not write to
    the residual stream.
    """
    if len(examples) < 2 or not searched:
        raise XgbloraError(
            f"a booster is fitted on at least 2 examples and 1 finds its step length, got {len(examples)} and "
            f"{len(searched)}"
        )
    forwards = _Forwards(adapters, classification, packed, lower_layers)
    require_writers(adapters)
    seen = forwards.observe(examples)
    learner = fit(seen, TailLoss(tail, seen, classification), ridge, turned_down(adapters))
    batches = list(_parts(searched, packed))
    losses: dict[float, Tensor] = {}

    def loss_at(step: float) -> float:
        if step not in losses:
            _put(adapters, learner, step)
            losses[step] = forwards.losses(batches)
        return losses[step].mean().item()

    chosen = shortest_as_good(losses, line_search(loss_at, step_length))
    _put(adapters, learner, chosen * shrinkage)
    return Boost(
        loss=learner.loss,
        before=losses[0.0].mean().item(),
        after=losses[chosen].mean().item(),
        step_length=chosen,
        passes=1 + len(losses),
        sequences=sum(batch.segments for batch in seen.batches) + len(searched) * len(losses),
        tokens=forwards.tokens,
    )


@dataclass(frozen=True)
class Observed:
    """Activations where something is predicted, float32: T of them, in the order of the batches' ``read``.

    ``inputs``: (T, in) for each layer that trains. ``hidden``: (T, hidden) as the last decoder layer leaves it.
    ``batches``: what was forwarded.
    """

    batches: list[Batch]
    inputs: list[Tensor]
    hidden: Tensor


@dataclass(frozen=True)
class Learner:
    """``output``: u, (hidden,) of length 1. ``inputs``: a_m, (in,) for each layer. ``change``: f, (T,).

    ``loss``: mean loss of the examples before it.
    """

    output: Tensor
    inputs: list[Tensor]
    change: Tensor
    loss: float


class TailLoss:
    """The loss as a function of the hidden states behind the last decoder layer, all else as it was observed."""

    def __init__(self, tail: "Tail", seen: Observed, classification: bool) -> None:
        self.tail = tail
        self.classification = classification
        batches = seen.batches
        if all(batch.single_token for batch in batches):  # few rows of the head: one call for all
            batches = [build_batch([e for b in batches for e in b.examples], batches[0].packed).to(seen.hidden.device)]
        self.parts: list[tuple[Batch, slice]] = []
        start = 0
        for batch in batches:
            stop = start + batch.read.numel()
            self.parts.append((batch, slice(start, stop)))
            start = stop

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (examples,) of ``hidden`` (T, hidden), and the gradient of their sum, (T, hidden)."""
        gradient = torch.empty_like(hidden)
        found = []
        for batch, reads in self.parts:
            own = hidden[reads].detach().requires_grad_()
            with torch.enable_grad():
                scores = self.tail.scores(own, batch, not self.classification)
                losses = score_losses(scores, batch.label, self.classification)
                (gradient[reads],) = torch.autograd.grad(losses.sum(), own)
            found.append(losses.detach())
        return torch.cat(found), gradient

    def curvature(self, hidden: Tensor, direction: Tensor) -> float:
        """Mean second derivative of an example's loss along ``direction`` where all options are equally likely.

        That is the variance of the scores' slopes over an example's options; taken where the model is undecided, it
        does not shrink as the model grows sure. Without options to choose from, it is taken where the model is.
        """
        step = 0.01 * hidden.square().mean().sqrt() * hidden.shape[1] ** 0.5
        bends = []
        for batch, reads in self.parts:
            ahead, here, behind = (
                self.tail.scores(hidden[reads] + sign * step * direction, batch, not self.classification)
                for sign in (1, 0, -1)
            )
            if self.classification:
                slopes = ((ahead - behind) / (2 * step)).masked_fill(~here.isfinite(), torch.nan)
                bends.append((slopes - slopes.nanmean(1, keepdim=True)).square().nanmean(1))
            else:
                bent = -(ahead - 2 * here + behind) / step**2
                bends.append(bent.gather(1, batch.label[:, None])[:, 0])
        return max(torch.cat(bends).mean().item(), torch.finfo(torch.float32).tiny)


def fit(
    seen: Observed, loss: TailLoss, ridge: float, own: Sequence[Callable[[Tensor], Tensor] | None] | None = None
) -> Learner:
    """The weak learner that lowers the loss of final hidden states h_t + f_t u most, f_t = sum_m a_m . x_t^m.

    Inputs of a layer are divided by their mean distance from their mean, so that every layer counts alike; they keep
    their mean, which serves as the intercept. The penalty is ridge * variance * curvature / 2 * sum |a_m|^2, with the
    mean squared distance of the scaled inputs from their mean and the loss's second derivative along u: both make
    ``ridge`` a number without units.

    ``own``: what :func:`turned_down` says of each layer. Layers that it names are turned down instead, all by one share
    gamma that is not penalised: a_m = -gamma W_m^T u.
    """
    own = own or [None] * len(seen.inputs)
    scales = []
    gram = seen.hidden.new_zeros(len(seen.hidden), len(seen.hidden), dtype=torch.float64)
    variance = 0.0
    for x, write in zip(seen.inputs, own, strict=True):
        centred = x - x.mean(0)
        spread = centred.norm(dim=1).mean()
        # A layer may see the same input in every example (the first one, at a prompt's last word): nothing to learn.
        flat = write is not None or spread <= 1e-5 * x.norm(dim=1).mean()
        scale = torch.zeros_like(spread) if flat else 1 / spread / own.count(None) ** 0.5
        scales.append(scale)
        if not flat:
            scaled = x * scale
            gram += (scaled @ scaled.T).double()
            variance += (centred * scale).square().sum(1).mean().item()
    values, vectors = torch.linalg.eigh(gram)
    penalty = ridge * variance
    kept = values > max(1e-9 * values[-1].item(), 1e-12)
    values, vectors = values[kept], vectors[:, kept]

    start, uphill = loss(seen.hidden)
    before = start.double().mean().item()
    if not kept.any():  # all examples look alike to these layers
        width = seen.hidden.shape[1]
        none = [torch.zeros_like(x[0]) for x in seen.inputs]
        return Learner(torch.eye(1, width, device=gram.device)[0], none, torch.zeros_like(seen.hidden[:, 0]), before)
    # Reduced-rank ridge regression of the pseudo-residuals on the inputs: the direction in which it explains most.
    fitted = (vectors * (values / (values + penalty))) @ (vectors.T @ -uphill.double())
    output = torch.linalg.svd(fitted, full_matrices=False)[2][0].float()
    output = output if (uphill @ output).sum() <= 0 else -output

    root = (vectors * values.sqrt()).float()  # f = root @ b, and sum |a_m|^2 = |b|^2
    weight = torch.full(root.shape[1:], penalty * loss.curvature(seen.hidden, output), device=root.device)
    written = [None if write is None else write(output) for write in own]
    opinion = torch.zeros_like(seen.hidden[:, 0])
    for x, w in zip(seen.inputs, written, strict=True):
        if w is not None:
            opinion += x @ w
    unit = 0.0
    if opinion.any():
        unit = (root.norm() / opinion.norm()).item()  # the column has the size of the others together
        root, weight = torch.cat([root, -unit * opinion[:, None]], dim=1), F.pad(weight, (0, 1))
    b = nn.Parameter(torch.zeros(root.shape[1], device=root.device))
    optimizer = torch.optim.LBFGS([b], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        losses, gradient = loss(seen.hidden + (root @ b)[:, None] * output)
        b.grad = root.T @ (gradient @ output) + weight * b.detach()
        return losses.sum() + 0.5 * (weight * b.square()).sum()

    optimizer.step(closure)
    found = b.detach()
    gamma = unit * found[-1]
    dual = (vectors @ (found[: len(values)].double() / values.sqrt())).float()
    inputs = [
        scale**2 * (x.T @ dual) if w is None else -gamma * w
        for x, scale, w in zip(seen.inputs, scales, written, strict=True)
    ]
    return Learner(output, inputs, root @ found, before)


def line_search(loss_at: Callable[[float], float], start: float, most: int = 8) -> float:
    """The step with the lowest loss found: from ``start`` by doubling or halving, then where a parabola has its lowest.

    0 where no step is better than none. ``loss_at`` is called for 0 and at most ``most`` other steps.
    """
    tried = {0.0: loss_at(0.0), start: loss_at(start)}
    best = start
    if tried[start] < tried[0.0]:
        while len(tried) < most and best == max(tried):
            tried[2 * best] = loss_at(2 * best)
            best = min(tried, key=tried.__getitem__)
    while len(tried) < most and (best == 0.0 or best == sorted(tried)[1]):
        smaller = sorted(tried)[1] / 2
        tried[smaller] = loss_at(smaller)
        best = min(tried, key=tried.__getitem__)
    if best > 0 and 2 * best in tried and best / 2 in tried:
        left, middle, right = (tried[step] for step in (best / 2, best, 2 * best))
        bend = left - 2 * middle + right
        if bend > 0:
            vertex = best * 2 ** ((left - right) / (2 * bend))
            tried[vertex] = loss_at(vertex)
    return min(tried, key=tried.__getitem__)


def shortest_as_good(losses: dict[float, Tensor], best: float) -> float:
    """The shortest step above 0 whose loss is within a standard error of the best step's, paired by example.

    ``losses``: (examples,) for each step tried. The one-standard-error rule (Breiman et al. 1984, "Classification and
    regression trees"): with few examples the lowest mean is mostly a lucky one, and what a step leaves undone is the
    next booster's. 0 stays 0.
    """
    for step in sorted(losses):
        more = losses[step] - losses[best]
        if 0 < step <= best and more.mean() <= more.std(correction=0) / len(more) ** 0.5:
            return step
    return best


class Tail(nn.Module):
    """What a model does between its last decoder layer and its head: a norm, in some also a projection; in float32."""

    def __init__(self, model: PreTrainedModel, packed: bool) -> None:
        """Found by watching one short forward, and checked. Raises :class:`XgbloraError` where it is something else."""
        super().__init__()
        batch = build_batch([Example([1, 2, 3], [[4], [5]], 0), Example([6, 7], [[4], [5]], 0)], packed)
        batch = batch.to(model.device)
        blocks = list(decoder_layers(model))
        around = {blocks[-1].rsplit(".", depth)[0] for depth in range(1, blocks[-1].count(".") + 1)} | {""}
        called: list[nn.Module] = []
        handles = [
            module.register_forward_hook(lambda module, *_: called.append(module))
            for name, module in model.named_modules()
            if name and name not in around and name.rpartition(".")[0] in around
        ]
        handles.append(model.get_submodule(blocks[-1]).register_forward_hook(lambda *_: called.clear()))
        try:
            with _last_layer(model) as last, torch.no_grad():
                expected = read_hidden(model, batch).float()
        finally:
            for handle in handles:
                handle.remove()
        self.model = [model]  # in a list: not a submodule
        self.steps = nn.ModuleList(copy.deepcopy(module).float() for module in called)
        found = self(_rows(last[-1], batch))
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.02, atol=0.02):
            raise XgbloraError(
                f"--recipe boost cannot follow what {type(model).__name__} does after its last layer: use --recipe "
                "classic"
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden) behind the last decoder layer -> what the head takes."""
        for step in self.steps:
            hidden = step(hidden)
        return hidden

    def scores(self, hidden: Tensor, batch: Batch, normalised: bool) -> Tensor:
        """Option scores (segments, options) of hidden states (reads, hidden) behind the last decoder layer."""
        return hidden_scores(self.model[0], self(hidden), batch, normalised)


class _Forwards:
    """Forwards of the model with its boosters and the pair as it is, counted."""

    def __init__(
        self, adapters: Adapters, classification: bool, packed: bool, lower_layers: LowerLayers | None
    ) -> None:
        self.adapters = adapters
        self.classification = classification
        self.packed = packed
        self.lower_layers = lower_layers
        self.tokens = 0

    @contextmanager
    def _ready(self, batch: Batch) -> Iterator[Batch]:
        """The batch to run, with the layers below the lowest one that trains from memory where they are."""
        filled = batch.filled()
        self.tokens += batch.tokens
        with self.lower_layers.shared(batch, filled) if self.lower_layers else nullcontext():
            yield filled

    def observe(self, examples: Sequence[Example]) -> Observed:
        """One forward over as many of the examples as predict no more than MOST_READS tokens."""
        layers = [layer for layer, _, _ in self.adapters.slices]
        inputs: list[list[Tensor]] = [[] for _ in layers]
        hidden: list[Tensor] = []
        batches = []
        for each in _parts(_within(examples, MOST_READS), self.packed):
            batch = each.to(self.adapters.device)
            with self._ready(batch) as filled, _inputs(layers) as entered, _last_layer(self.adapters.model) as last:
                read_hidden(self.adapters.model, filled)
            for rows, x in zip(inputs, entered, strict=True):
                rows.append(_rows(x, batch))
            hidden.append(_rows(last[-1], batch))
            batches.append(batch)
        return Observed(batches, [torch.cat(rows) for rows in inputs], torch.cat(hidden))

    def losses(self, batches: Sequence[Batch]) -> Tensor:
        """Losses of the examples of ``batches``, (examples,) float64."""
        losses = []
        for batch in batches:
            with self._ready(batch.to(self.adapters.device)) as filled:
                scores = option_scores(self.adapters.model, filled, normalised=not self.classification)
                losses.append(score_losses(scores, filled.label, self.classification))
        return torch.cat(losses).double()


def _rows(activation: Tensor, batch: Batch) -> Tensor:
    """The positions of an activation (..., width) where ``batch`` predicts something: (reads, width) float32."""
    return activation.reshape(-1, activation.shape[-1])[batch.read].float()


def _within(examples: Sequence[Example], reads: int) -> list[Example]:
    """The first examples that predict at most ``reads`` tokens together, shortest first."""
    chosen: list[Example] = []
    for example in examples:
        reads -= 1 + sum(len(option) - 1 for option in example.options)
        reads -= len(example.prompt) - 1 if example.score_prompt else 0
        if reads < 0 and chosen:
            break
        chosen.append(example)
    return sorted(chosen, key=lambda e: len(e.prompt))


def _parts(examples: Sequence[Example], packed: bool) -> Iterator[Batch]:
    """Batches of consecutive examples of about PART_TOKENS tokens."""
    return (build_batch(group, packed) for group in split_by_tokens(examples, PART_TOKENS))


def _put(adapters: Adapters, learner: Learner, step: float) -> None:
    """The learner as the pair in training: A = a_m, B = step * u / scaling; zero in layers that do not train."""
    for layer in adapters.layers.values():
        layer.lora_B.zero_()
    for (layer, _, _), a in zip(adapters.slices, learner.inputs, strict=True):
        layer.lora_A.copy_(a[None])
        layer.lora_B.copy_((step / layer.scaling * learner.output)[:, None])


@contextmanager
def _inputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What enters each of ``layers``, which a model runs in this order, in the one forward inside the block."""
    found: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0])) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _last_layer(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list of what the last decoder layer returns in the forwards inside the block."""
    found: list[Tensor] = []
    layer = list(decoder_layers(model).values())[-1]
    handle = layer.register_forward_hook(
        lambda _, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield found
    finally:
        handle.remove()
