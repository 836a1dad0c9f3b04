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
   examples' space by Newton steps. MLP layers are turned down along u: their pairs are a_m = -gamma W_m^T u, which
   takes the share gamma of what they write away, and gamma is fitted with the rest, unpenalised;
4. the layers above do change what passes through them (on SmolLM2 by a factor of 2, nearly the same for all examples),
   so the step length is found by forward passes over examples that no fit has seen.

Fitted to labels one after the other, boosters learn what their predecessors had by heart. So where there are options
to choose from, the labels are used once. A teacher, the same fit to the attention layers of the bare model, says how
every example is to be answered; it also finds out whether what the base says along u is worth keeping. The boosters
follow it, each fitted to what still divides the model from it, with hardly any ridge: its words carry no chance.

Nothing is propagated back through the model's layers, and no direction is random.
"""

from xgblora.learn.fitted.boost import BoostRecipe
from xgblora.learn.fitted.recipe import Fit, Recipe

RECIPES: dict[str, type[BoostRecipe]] = {"boost": BoostRecipe}
"""The recipes that fit pairs, by the value of --recipe."""

__all__ = ["RECIPES", "BoostRecipe", "Fit", "Recipe"]
