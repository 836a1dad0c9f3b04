"""Packed weights that wait in the computer's memory and are brought to a GPU as they are needed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from xgblora.base.residency import Residency


@dataclass
class _Berth:
    """Room for one weight on both sides, and when each side is free again."""

    host: Tensor
    device: Tensor
    arrived: torch.cuda.Event
    """The bytes are on the device."""
    left: torch.cuda.Event
    """Nothing that was asked for so far reads them any more."""


class Ferry:
    """Brings bytes of a mapped file to a GPU, the next weight while one computes.

    The bytes go through pinned memory, which a GPU reads without the processor's help, on a stream of their own. What
    fits into the budget stays there.

    Args:
        read: (first byte, bytes) -> what lies there, in the computer's memory.
        budget: Bytes of the GPU's memory that may be taken in all.
        device: A CUDA device.
    """

    def __init__(self, read: Callable[[int, int], Tensor], budget: int, device: torch.device) -> None:
        self.read, self.device = read, device
        self._residency = Residency(budget, lambda: torch.cuda.max_memory_allocated(device))
        self._kept: dict[int, Tensor] = {}
        self._berths: list[_Berth] = []
        self._turn = 0
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ferry")
        self._coming: tuple[int, Future[_Berth]] | None = None
        self._in_use: _Berth | None = None

    def bytes(self, start: int, size: int) -> Tensor:
        """``size`` bytes from ``start`` on (size,) uint8, on the device until :meth:`used`."""
        if start in self._kept:
            return self._kept[start]
        if self._coming is None or self._coming[0] != start:
            self._send(start, size)
        assert self._coming is not None
        berth = self._coming[1].result()
        self._coming, self._in_use = None, berth
        torch.cuda.current_stream(self.device).wait_event(berth.arrived)
        return berth.device[:size]

    def used(self, start: int, size: int) -> None:
        """The weight was read: keep it on the device where it fits, and send for the next one.

        Raises:
            MemoryBudgetError: The budget is too small even with no weight on the device.
        """
        berth, self._in_use = self._in_use, None
        stays, dropped = self._residency.used(start, size)
        for gone in dropped:
            del self._kept[gone]
        if berth is not None:
            if stays:
                self._kept[start] = berth.device[:size].clone()
            berth.left.record(torch.cuda.current_stream(self.device))
        if (following := self._residency.next(start)) is not None:
            self._send(*following)

    def _send(self, start: int, size: int) -> None:
        """Begin to bring a weight; one that was coming and is not wanted now gives way."""
        if self._coming is not None:
            if self._coming[0] == start:
                return
            self._coming[1].result()
        berth = self._berth(size)
        self._coming = start, self._thread.submit(self._bring, berth, start, size)

    def _berth(self, size: int) -> _Berth:
        """The berth whose turn it is, large enough."""
        self._turn = 1 - self._turn
        if len(self._berths) < 2:
            self._berths.append(_berth(size, self.device))
            self._turn = len(self._berths) - 1
        elif self._berths[self._turn].host.numel() < size:
            self._berths[self._turn].left.synchronize()
            self._berths[self._turn].arrived.synchronize()
            self._berths[self._turn] = _berth(size, self.device)
        return self._berths[self._turn]

    def _bring(self, berth: _Berth, start: int, size: int) -> _Berth:
        berth.arrived.synchronize()  # the last copy out of the pinned memory
        berth.host[:size].copy_(self.read(start, size))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(berth.left)
            berth.device[:size].copy_(berth.host[:size], non_blocking=True)
            berth.arrived.record(self._stream)
        return berth


def _berth(size: int, device: torch.device) -> _Berth:
    with torch.inference_mode(False):  # it serves forwards with gradients, too
        return _Berth(
            torch.empty(size, dtype=torch.uint8, pin_memory=True),
            torch.empty(size, dtype=torch.uint8, device=device),
            torch.cuda.Event(),
            torch.cuda.Event(),
        )
