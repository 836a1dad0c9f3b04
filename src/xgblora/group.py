"""The processes that share one run. torchrun starts them; what they exchange is a few bytes an example.

Each of them carries out the whole run: the same rows, the same random numbers, the same decisions. Forwards alone are
shared out: each part of a batch is forwarded by one process, and all get its results, bit for bit and in one order. So
what a run computes does not depend on how many processes share it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from xgblora.errors import XgbloraError, one_line

if TYPE_CHECKING:  # torch takes a second to import, and the command line asks for its place first
    import torch
    from torch import Tensor

T = TypeVar("T")

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables by which torchrun tells a process its place. Hidden from accelerate, which would share out rows by them."""

PATIENCE = 600.0
"""Seconds that others are waited for, where no flag says so."""

HEADER = 4
"""Bytes in front of what is exchanged: the signal that asks the run to stop, or 0."""

ANOTHER = "the last checkpoint is kept; the same command goes on from there, with any number of processes"


@dataclass
class _Group:
    number: int = 0
    size: int = 1
    local: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """How long others are waited for."""
    store: Any = None
    """What processes meet at, once they have."""
    signal: int = 0
    """That this process received, and has yet to tell."""
    stopping: int = 0
    """The signal that all know of."""
    leaving: ExitStack = field(default_factory=ExitStack)
    """What is to be undone at the end."""


_group = _Group()


class LostProcessError(XgbloraError):
    """Another process of the run is gone, or silent for too long."""


def join() -> None:
    """Take this process's place among those that torchrun started; alone, nothing happens.

    Call it before anything of transformers' is made. Others are met later, in :func:`meet`.

    Raises:
        XgbloraError: The variables do not name a place.

    Example::

        xgblora.join()
        config = RunConfig(output_dir="runs/mine", ddp_timeout=60)
        Trainer(model, config, attach(model, xgblora=True), rows).train()
    """
    if "WORLD_SIZE" not in os.environ:
        return
    environment = {name: os.environ.pop(name) for name in PLACE if name in os.environ}
    try:
        number, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", number))
    except (KeyError, ValueError) as error:
        raise XgbloraError(f"RANK and WORLD_SIZE must be numbers, as torchrun sets them ({one_line(error)})") from error
    if not 0 <= number < size:
        raise XgbloraError(f"RANK must be below WORLD_SIZE, got {number} and {size}")
    _group.number, _group.size, _group.local, _group.environment = number, size, local, environment


def size() -> int:
    """How many processes share the run; 1 where this one is alone."""
    return _group.size


def number() -> int:
    """This process's number; the first one, 0, writes the files."""
    return _group.number


def first() -> bool:
    """Whether this process writes the files."""
    return _group.number == 0


def meet(seconds: float = PATIENCE) -> None:
    """Meet the other processes, once.

    Args:
        seconds: How long to wait for them, now and later.

    Raises:
        XgbloraError: They did not come, or the port is in use.
    """
    if _group.size == 1 or _group.store is not None:
        return
    import torch
    from torch import distributed

    limit = timedelta(seconds=seconds)
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    os.environ.update(_group.environment)
    try:
        store, *_ = next(iter(distributed.rendezvous("env://", timeout=limit)))
        store = distributed.PrefixStore("xgblora", store)
        distributed.init_process_group("gloo", store=store, rank=_group.number, world_size=_group.size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise XgbloraError(f"{place} is in use: choose another port (torchrun --master_port)") from error
        raise XgbloraError(
            f"process {_group.number} of {_group.size} did not meet all others at {place} within {seconds:g} seconds "
            f"(--ddp_timeout): start as many as WORLD_SIZE says ({one_line(error, 120)})"
        ) from error
    finally:
        for name in _group.environment:
            os.environ.pop(name, None)
    if torch.cuda.is_available():
        torch.cuda.set_device(_group.local % torch.cuda.device_count())
    _group.store, _group.seconds = store, seconds


def leave() -> None:
    """Leave the others, at the end."""
    if _group.store is not None:
        from torch import distributed

        distributed.destroy_process_group()
        _group.store = None
    _group.leaving.close()


def at_leaving(undo: Callable[[], object]) -> None:
    """Let something be undone when this process leaves."""
    _group.leaving.callback(undo)


def speaks() -> bool:
    """Whether this process is to say why the run ended: the first that asks."""
    if _group.store is None:
        return first()
    try:
        told: int = _group.store.add("told", 1)
    except RuntimeError:  # it went with the process that kept it
        return True
    return told == 1


def owners(parts: int | Sequence[int]) -> list[int]:
    """Which process computes each part.

    Args:
        parts: How many there are, which are taken in turn; or how much work each of them is: the largest are given away
            first, always to the process that has least.

    Examples:
        >>> owners([5, 3])
        [0, 0]
    """
    if isinstance(parts, int):
        return [part % _group.size for part in range(parts)]
    owner, loads = [0] * len(parts), [0] * _group.size
    for part in sorted(range(len(parts)), key=lambda part: -parts[part]):
        owner[part] = loads.index(min(loads))
        loads[owner[part]] += parts[part]
    return owner


def mine(parts: int | Sequence[int]) -> list[int]:
    """Numbers of the parts that this process computes, by :func:`owners`.

    Examples:
        >>> mine(3)
        [0, 1, 2]
    """
    return [part for part, owner in enumerate(owners(parts)) if owner == _group.number]


def gather(
    results: Sequence["Tensor"],
    shapes: Sequence[Sequence[int]],
    device: "torch.device | str" = "cpu",
    work: Sequence[int] | None = None,
) -> list["Tensor"]:
    """The results of all parts, in order, on every process.

    Args:
        results: float32, of the parts that are :func:`mine`, in order.
        shapes: Of the results of all parts.
        device: Where the results of others go.
        work: How much each part was, where parts were shared out by that.

    Raises:
        LostProcessError: Another process is gone.
    """
    if _group.size == 1:
        return list(results)
    meet()
    import torch
    from torch import distributed

    parts = len(shapes) if work is None else work
    owner = owners(parts)
    lengths = [4 * _product(shape) for shape in shapes]
    longest = max(
        sum(length for length, process in zip(lengths, owner, strict=True) if process == number)
        for number in range(_group.size)
    )
    sent = torch.zeros(HEADER + longest, dtype=torch.uint8)
    sent[0] = _group.signal
    end = HEADER
    ours = [part for part, process in enumerate(owner) if process == _group.number]
    for part, result in zip(ours, results, strict=True):
        if result.dtype != torch.float32 or tuple(result.shape) != tuple(shapes[part]):
            raise ValueError(f"part {part} has {result.dtype} {tuple(result.shape)}, not float32 {tuple(shapes[part])}")
        sent[end : end + lengths[part]] = result.detach().cpu().contiguous().view(-1).view(torch.uint8)
        end += lengths[part]
    received = [torch.empty_like(sent) for _ in range(_group.size)]
    received[_group.number] = sent
    others = [number for number in range(_group.size) if number != _group.number]
    with _talking():  # one message each way: gloo's own all-gather of so little takes twice as many packets
        waiting = [distributed.irecv(received[number], number) for number in others]
        waiting += [distributed.isend(sent, number) for number in others]
        for message in waiting:
            assert message is not None  # this process is one of the group
            message.wait()
    _group.stopping = max(int(block[0]) for block in received)
    ends = [HEADER] * _group.size
    every = []
    for process, shape, length in zip(owner, shapes, lengths, strict=True):
        block = received[process][ends[process] : ends[process] + length]
        ends[process] += length
        every.append(block.view(torch.float32).view(tuple(shape)).to(device))
    return every


def gather_objects(value: T) -> list[T]:
    """What each process gives, by number: anything that can be pickled.

    Raises:
        LostProcessError: Another process is gone.
    """
    if _group.size == 1:
        return [value]
    meet()
    from torch import distributed

    values: list[Any] = [None] * _group.size
    with _talking():
        distributed.all_gather_object(values, value)
    return values


def gather_parts(results: Sequence[T], parts: int) -> list[T]:
    """As :func:`gather`, of anything that can be pickled.

    Raises:
        LostProcessError: Another process is gone.
    """
    of_each = gather_objects(list(results))
    return [of_each[part % _group.size][part // _group.size] for part in range(parts)]


def total(count: int) -> int:
    """The sum of a count over the processes."""
    return sum(gather_objects(count))


def ask_to_stop(signal: int) -> None:
    """A signal asks the run to stop: the others are told with what is exchanged next. 0: nothing asks."""
    _group.signal = signal
    if not signal:
        _group.stopping = 0


def stopping() -> int:
    """The signal that asks the run to stop, as all processes know it now; 0 where there is none."""
    return _group.signal if _group.size == 1 else _group.stopping


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's own words name a line of its source
        why = f"silent for {_group.seconds:g} seconds" if "timed out" in str(error).lower() else "lost"
        raise LostProcessError(f"another process of this run was {why}: {ANOTHER}") from error


def _product(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
