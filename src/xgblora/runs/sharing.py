"""How several processes carry out one run: all of it each, but the first one alone writes files that stay."""

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import xgblora
from xgblora import agreement, group
from xgblora.base import Base
from xgblora.config import RunConfig, differences
from xgblora.errors import XgbloraError

logger = logging.getLogger(__name__)

PATHS = ("model_name", "data_dir", "task_file", "other_text")
"""Flags that may name other places on another machine: what lies there is compared."""


def of_this_process(config: RunConfig) -> RunConfig:
    """Meet the processes that share a run, and say what this one of them carries out: ``config`` itself on the first.

    The others write into a folder of their own that goes when they end, and say nothing.

    Raises:
        XgbloraError: They do not come, or have other code or other flags.
    """
    if group.size() == 1:
        return config
    group.meet(config.ddp_timeout)
    config.take_dtype(agreement.of_first(lambda: config.dtype))  # it may have been measured
    agreement.require_same(lambda: {"version of xgblora": _code(), "version of torch": torch.__version__})
    settings = group.gather_objects(config.resolved())
    for number, theirs in enumerate(settings):
        if different := differences(settings[0], theirs | {name: settings[0][name] for name in PATHS}):
            raise XgbloraError(f"process {number} has other flags than process 0 ({', '.join(different[:3])})")
    if group.first():
        logger.info(
            "%d processes share the run: the flags say what all do together, and the first one writes the files",
            group.size(),
        )
        return config
    other = copy.copy(config)
    other.output_dir, other.result_file = agreement.own_folder(str(config.output_dir)), None
    other.disable_tqdm, other.report_to = True, []
    return other


def require_same_inputs(base: Base, digests: Callable[[], Mapping[str, str]]) -> None:
    """Raise :class:`XgbloraError` where processes read other files, or have another model.

    Args:
        base: The model.
        digests: SHA-256 of the files that were read; asked for where there are several processes.
    """
    agreement.require_same(
        lambda: {**digests(), **{f"base model ({name})": value for name, value in base.fingerprint().items()}}
    )


def _code() -> str:
    """SHA-256 of this package's source."""
    digest = hashlib.sha256()
    root = Path(xgblora.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
