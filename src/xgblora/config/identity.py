"""Which settings make a run what it is; configurations with other settings."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from xgblora.config.flag import default_of
from xgblora.config.flags import FLAGS, Flags
from xgblora.config.run_config import RunConfig

LEFT_TO_THE_TASK = ("train_as_classification", "num_dev", "boost_keep")
"""Settings that are None until the run has read its task."""


def defaults() -> dict[str, Any]:
    """The default of every flag of a run."""
    return {field.name: default_of(field) for field in dataclasses.fields(Flags) if field.init}


def _decisive(settings: Mapping[str, Any]) -> set[str]:
    """Names of the flags that decide what a run with these settings computes."""
    namespace = SimpleNamespace(**settings)
    return {name for name, flag in FLAGS.items() if flag.identity and flag.idle(namespace) is None}


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings of a ``config.json`` that decide what its run computes."""
    names = _decisive({**defaults(), **settings})
    return {name: value for name, value in settings.items() if name in names}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """How two runs differ, as ``name theirs -> ours``; empty where they compute the same.

    Flags without effect in either run do not count. A run of a version that lacked a flag is one of its default.

    Args:
        theirs: Settings read back from a ``config.json``.
        ours: :meth:`RunConfig.resolved` of a run that has not begun.
    """
    theirs = {**defaults(), **theirs}
    undecided = {name for name in LEFT_TO_THE_TASK if ours[name] is None}
    names = (_decisive(theirs) | _decisive(ours)) - undecided
    different = [name for name in names if theirs[name] != ours[name]]
    different.sort(key=lambda name: (name != "recipe", name))  # other flags may differ because the recipe does
    return [f"{name} {theirs[name]} -> {ours[name]}" for name in different]


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """A plain :class:`RunConfig` with what ``config`` (or a subclass of it) was given, and some changes."""
    names = [field.name for field in dataclasses.fields(RunConfig) if field.init]
    return RunConfig(**{name: config.asked[name] for name in names} | changes)


def without_idle_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with every flag that has no effect among them back at its default."""
    namespace, default = SimpleNamespace(**settings), defaults()
    idle = {name: default[name] for name, flag in FLAGS.items() if flag.idle(namespace) is not None}
    return {**settings, **idle}
