"""The one way in which a module of a model is exchanged and put back."""

from contextlib import ExitStack
from typing import Any

from torch import nn


def swap(model: nn.Module, name: str, module: nn.Module, undo: ExitStack) -> None:
    """Put ``module`` in the place called ``name``; closing ``undo`` puts the former one back.

    Examples:
        >>> model = nn.Sequential(nn.ReLU())
        >>> with ExitStack() as undo:
        ...     swap(model, "0", nn.Tanh(), undo)
        ...     print(model[0])
        Tanh()
        >>> print(model[0])
        ReLU()
    """
    undo.callback(model.set_submodule, name, model.get_submodule(name))
    model.set_submodule(name, module)


class StandIn(nn.Module):
    """A module in the place of ``source``, whose other attributes it has."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = [source]  # in a list: not a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["source"][0], name)
