"""The bytes of a .gguf file, mapped into memory, and how many of them may stay there."""

import mmap
import os
import warnings
from pathlib import Path

import psutil
import torch
from torch import Tensor

from xgblora.base.ferry import Ferry
from xgblora.base.residency import Residency
from xgblora.errors import XgbloraError


class PackedFile:
    """A file that stays mapped for as long as its weights are used.

    Mapped bytes take no memory of their own: the system keeps them once for all processes. Without a budget they stay
    for as long as the system lets them.

    Args:
        path: The file. It is never written to, and must not change.
        memory_budget: Bytes that this process may have resident, on a GPU those of the GPU. Weights that do not fit
            in beside what a forward needs are let go after every use and read again, while another one computes; the
            others stay.
    """

    def __init__(self, path: Path, memory_budget: int | None = None) -> None:
        self.path, self.budget = path, memory_budget
        self._file = path.open("rb", buffering=0)
        self._state = self._now()
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():  # torch would rather have bytes that it may write to
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        process = psutil.Process()
        self._ferries: dict[torch.device, Ferry] = {}
        self._residency = None if memory_budget is None else Residency(memory_budget, lambda: process.memory_info().rss)

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def require_unchanged(self) -> None:
        """Raise :class:`XgbloraError` where somebody wrote to the file since it was opened."""
        if self._now() != self._state:
            raise XgbloraError(f"{self.path} changed while it was in use: its weights are no longer what they were")

    def bytes(self, start: int, size: int, device: torch.device | None = None) -> Tensor:
        """``size`` bytes from ``start`` on (size,) uint8, in the file itself; on a GPU a copy, until they were used."""
        if device is not None and device.type != "cpu":
            return self._ferry(device).bytes(start, size)
        return self._bytes[start : start + size]

    def used(self, start: int, size: int, device: torch.device) -> None:
        """A weight was read, and is not wanted before the next forward: let go of it where memory is short.

        Raises:
            MemoryBudgetError: The budget is too small even with no weight in memory.
        """
        if device.type != "cpu":
            return self._ferry(device).used(start, size)
        if self._residency is None:
            return None
        stays, dropped = self._residency.used(start, size)
        for kept, length in dropped.items():
            self._advise("MADV_DONTNEED", kept, length)
        if not stays:
            self._advise("MADV_DONTNEED", start, size)
            if (following := self._residency.next(start)) is not None:
                self._advise("MADV_WILLNEED", *following)
        return None

    def _ferry(self, device: torch.device) -> Ferry:
        """What brings weights to a GPU."""
        if device not in self._ferries:
            assert self.budget is not None  # without one a file is moved whole
            self._ferries[device] = Ferry(self.bytes, self.budget, device)
        return self._ferries[device]

    def _advise(self, advice: str, start: int, size: int) -> None:
        """Tell the system what comes of some bytes; Windows decides by itself."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: neighbours share the others
        length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and (option := getattr(mmap, advice, None)) is not None:
            self._map.madvise(option, first, length)
