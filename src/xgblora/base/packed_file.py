"""The bytes of a .gguf file, mapped into memory, and how many of them may stay there."""

import mmap
import os
import warnings
from pathlib import Path

import psutil
import torch
from torch import Tensor

from xgblora.errors import XgbloraError


class PackedFile:
    """A file that stays mapped for as long as its weights are used.

    Mapped bytes take no memory of their own: the system keeps them once for all processes. Without a budget they stay
    for as long as the system lets them.

    Args:
        path: The file. It is never written to, and must not change.
        memory_budget: Bytes that this process may have resident. Weights that do not fit in beside what a forward
            needs are let go after every use and read again, while another one computes; the others stay.
    """

    def __init__(self, path: Path, memory_budget: int | None = None) -> None:
        self.path, self.budget = path, memory_budget
        self._file = path.open("rb", buffering=0)
        self._state = self._now()
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():  # torch would rather have bytes that it may write to
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._stay: dict[int, int] = {}
        self._next: dict[int, tuple[int, int]] = {}
        self._last: int | None = None
        self._peak = 0
        self._process = psutil.Process()

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def require_unchanged(self) -> None:
        """Raise :class:`XgbloraError` where somebody wrote to the file since it was opened."""
        if self._now() != self._state:
            raise XgbloraError(f"{self.path} changed while it was in use: its weights are no longer what they were")

    def mapped(self, start: int, size: int) -> Tensor:
        """``size`` bytes from ``start`` on (size,) uint8, in the file itself."""
        return self._bytes[start : start + size]

    def used(self, start: int, size: int) -> None:
        """A weight was read, and is not wanted before the next forward: let go of it where memory is short.

        The first forward lets go of all and shows what it takes without them; from then on weights stay as they fit.

        Raises:
            XgbloraError: The budget is too small even with no weight in memory.
        """
        if self.budget is None:
            return
        peak = self._peak_without_weights()
        if peak > self.budget:
            raise XgbloraError(
                f"a memory budget of {self.budget / 1e9:.2f} GB is too small: Python, libraries and one forward take "
                f"{peak / 1e9:.2f} GB here"
            )
        if peak + sum(self._stay.values()) > self.budget:  # a longer batch came
            for kept, length in self._stay.items():
                self._advise("MADV_DONTNEED", kept, length)
            self._stay.clear()
        again = start in self._next
        if self._last is not None and self._last not in self._next:
            self._next[self._last] = start, size
        self._last = start
        if start in self._stay:
            return
        if again and peak + sum(self._stay.values()) + size <= self.budget:
            self._stay[start] = size
            return
        self._advise("MADV_DONTNEED", start, size)
        if again and self._next[start][0] not in self._stay:
            self._advise("MADV_WILLNEED", *self._next[start])

    def _peak_without_weights(self) -> int:
        resident = self._process.memory_info().rss
        self._peak = max(self._peak, resident - sum(self._stay.values()))
        return self._peak

    def _advise(self, advice: str, start: int, size: int) -> None:
        """Tell the system what comes of some bytes; Windows decides by itself."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: neighbours share the others
        length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and (option := getattr(mmap, advice, None)) is not None:
            self._map.madvise(option, first, length)
