"""Configuration: every flag of a run, declared once, and what follows from its declaration."""

from xgblora.config.conditions import probed
from xgblora.config.describe import banner, better, idle_flags, notes, warn_rank
from xgblora.config.flag import NOT_NEGATIVE, POSITIVE, default_of, flag, is_size
from xgblora.config.flags import FLAGS, UNSUPPORTED, Flags
from xgblora.config.identity import changed, decisive, defaults, differences, without_idle_flags
from xgblora.config.precision import of_settings
from xgblora.config.rules import too_few_rows
from xgblora.config.run_config import RunConfig
from xgblora.config.shipped import EMBEDDED_MODEL, PACKED_MODEL

__all__ = [
    "EMBEDDED_MODEL",
    "FLAGS",
    "NOT_NEGATIVE",
    "PACKED_MODEL",
    "POSITIVE",
    "UNSUPPORTED",
    "Flags",
    "RunConfig",
    "banner",
    "better",
    "changed",
    "decisive",
    "default_of",
    "defaults",
    "differences",
    "flag",
    "idle_flags",
    "is_size",
    "notes",
    "of_settings",
    "probed",
    "too_few_rows",
    "warn_rank",
    "without_idle_flags",
]
