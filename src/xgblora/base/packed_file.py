"""The bytes of files of weights, mapped into memory, and how many of them may stay there."""

import bisect
import itertools
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

from xgblora.base.ferry import Ferry
from xgblora.base.residency import Residency
from xgblora.errors import XgbloraError


class _Mapped:
    """One file, mapped read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._state = self._now()
        self.size = self._state[0]
        self.map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():  # torch would rather have bytes that it may write to
            warnings.simplefilter("ignore", UserWarning)
            self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def require_unchanged(self) -> None:
        """Raise :class:`XgbloraError` where somebody wrote to the file since it was opened."""
        if self._now() != self._state:
            raise XgbloraError(f"{self.path} changed while it was in use: its weights are no longer what they were")


class PackedFile:
    """Files of weights that stay mapped for as long as they are used; several count as one behind the other.

    Mapped bytes take no memory of their own: the system keeps them once for all processes. Without a budget they stay
    for as long as the system lets them.

    Args:
        paths: The files. They are never written to, and must not change.
        memory_budget: Bytes that this process may have resident, on a GPU those of the GPU. Weights that do not fit
            in beside what a forward needs are let go after every use and read again, while another one computes; the
            others stay.
    """

    def __init__(self, paths: Sequence[Path], memory_budget: int | None = None) -> None:
        self.budget = memory_budget
        self._files = [_Mapped(path) for path in paths]
        self.starts = list(itertools.accumulate((file.size for file in self._files[:-1]), initial=0))
        """The first byte of each file."""
        self.size = sum(file.size for file in self._files)
        process = psutil.Process()
        self.read_bytes = 0
        """Bytes of weights that were read without having stayed in memory, with a budget."""
        self._held: dict[int, tuple[int, float]] | None = None
        self._ferries: dict[torch.device, Ferry] = {}
        self._residency = None if memory_budget is None else Residency(memory_budget, lambda: process.memory_info().rss)

    def _at(self, start: int) -> tuple[_Mapped, int]:
        """The file that a byte is in, and its place there."""
        number = bisect.bisect_right(self.starts, start) - 1
        return self._files[number], start - self.starts[number]

    def require_unchanged(self) -> None:
        """Raise :class:`XgbloraError` where somebody wrote to one of the files since it was opened."""
        for file in self._files:
            file.require_unchanged()

    def bytes(self, start: int, size: int, device: torch.device | None = None) -> Tensor:
        """``size`` bytes from ``start`` on (size,) uint8, in the file itself; on a GPU a copy, until they were used."""
        if device is not None and device.type != "cpu":
            return self._ferry(device).bytes(start, size)
        file, place = self._at(start)
        return file.bytes[place : place + size]

    @property
    def room(self) -> int:
        """Bytes that batches may take while they wait for others to pass a layer.

        Half of what nothing else has, since a layer computes on it, and at most a quarter of the budget.
        """
        if self._residency is None or self.budget is None:
            return 0
        return min(self.budget // 4, self._residency.left // 2)

    def used(self, start: int, size: int, device: torch.device, share: float = 1.0) -> None:
        """A weight was read, and is not wanted before the next forward: let go of it where memory is short.

        Args:
            start: First byte.
            size: Bytes.
            device: Where it was wanted.
            share: How much of it was read; of a part nothing stays, since the next one is another part.

        Raises:
            MemoryBudgetError: The budget is too small even with no weight in memory.
        """
        if device.type != "cpu":
            self._ferry(device).used(start, size)
            return
        if self._residency is None:
            return
        held = self._held or {}
        if start not in self._residency.stay and (share < 1 or start not in held):
            self.read_bytes += int(size * share)
        if self._held is None:
            self._let_go({start: (size, share)}, ahead=size)
        else:
            self._residency.look()
            self._held[start] = size, max(share, held[start][1] if start in held else 0.0)

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Weights that are used inside the block stay until what it gives is called, or the outermost block ends."""
        if self._held is not None:
            yield lambda: None
            return
        self._held = {}

        def release() -> None:
            held, self._held = self._held or {}, {}
            self._let_go(held, ahead=2 * sum(size for size, share in held.values() if share == 1))

        try:
            yield release
        finally:
            release()
            self._held = None

    def _let_go(self, used: Mapping[int, tuple[int, float]], ahead: int) -> None:
        """Let go of what does not stay, and read ``ahead`` bytes of what comes after it."""
        assert self._residency is not None
        last: int | None = None
        for start, (size, share) in used.items():
            if share == 1:
                stays, dropped = self._residency.used(start, size)
                for kept, length in dropped.items():
                    self._advise("MADV_DONTNEED", kept, length)
                last = start
            else:
                stays = start in self._residency.stay
            if not stays:
                self._advise("MADV_DONTNEED", start, size)
        while ahead > 0 and last is not None and (following := self._residency.next(last)) is not None:
            self._advise("MADV_WILLNEED", *following)
            last, ahead = following[0], ahead - following[1]

    def let_go(self, start: int, size: int) -> None:
        """Bytes that are not wanted again need not stay in memory."""
        self._advise("MADV_DONTNEED", start, size)

    def _ferry(self, device: torch.device) -> Ferry:
        """What brings weights to a GPU."""
        if device not in self._ferries:
            assert self.budget is not None  # without one a file is moved whole
            self._ferries[device] = Ferry(self.bytes, self.budget, device)
        return self._ferries[device]

    def _advise(self, advice: str, start: int, size: int) -> None:
        """Tell the system what comes of some bytes; Windows decides by itself."""
        file, place = self._at(start)
        first = -(-place // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: neighbours share the others
        length = (place + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and (option := getattr(mmap, advice, None)) is not None:
            file.map.madvise(option, first, length)
