"""Low-rank adapters, the ordered stack of boosters, and their files."""

from xgblora.adapters.adapters import Adapters, LayerSubset, attach
from xgblora.adapters.boosters import Booster, Ledger, load_adapters, start_from
from xgblora.adapters.linear import AdaptedLinear, Probe

__all__ = [
    "AdaptedLinear",
    "Adapters",
    "Booster",
    "LayerSubset",
    "Ledger",
    "Probe",
    "attach",
    "load_adapters",
    "start_from",
]
