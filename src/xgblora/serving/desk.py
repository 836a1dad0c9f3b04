"""One model, and a queue of requests before it, answered by one thread: many that wait are answered together."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from xgblora.errors import XgbloraError
from xgblora.learn.generation import DRAWN, GREEDY
from xgblora.learn.predictor import Prediction, Row
from xgblora.runs.finished import RunPredictor

MOST_WAITING = 1000
"""Requests; another one is refused at once."""
TOGETHER = 64
"""Rows that are answered in one evaluation at most."""


class BusyError(XgbloraError):
    """Too many requests wait."""


@dataclass
class Writing:
    """A text that the model goes on with, while somebody reads."""

    prompt: list[int]
    most: int
    """Tokens to write, at most."""
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    """0 is greedy."""
    boosters: int | None = None
    raw: bool = False
    """Whether spaces at its beginning count, as they do where a text goes on."""
    pass_on: Callable[[str | None], object] = lambda piece: None
    """Given every piece as it comes, and None at the end, by the thread that writes."""
    unwanted: threading.Event = field(default_factory=threading.Event)
    """Set by a reader who left."""
    tokens: int = 0
    text: str = ""
    """All of the pieces."""
    stopped: bool = False
    """Whether it ended by itself, before ``most`` tokens."""


@dataclass
class _Job:
    done: "Future[Any]"
    row: Row | None = None
    boosters: int | None = None
    work: Callable[[], Any] | None = None


class Desk:
    """Answers requests one after the other, those that wait for the same model together.

    The thread that answers opens the model, too: what torch keeps for a thread is kept once.

    Args:
        opening: Makes the predictor.

    Raises:
        XgbloraError: The model cannot be had.
    """

    def __init__(self, opening: Callable[[], RunPredictor]) -> None:
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MOST_WAITING)
        self._ahead: deque[_Job | None] = deque()
        opened: Future[RunPredictor] = Future()
        self._thread = threading.Thread(target=self._answer_all, args=(opening, opened), name="desk", daemon=True)
        self._thread.start()
        self.predictor = opened.result()

    def predict(self, row: Row, boosters: int | None = None) -> "Future[Prediction]":
        """What the model with its first boosters (by default with all) answers to a row.

        Raises:
            BusyError: Too many requests wait.
        """
        return self._put(_Job(Future(), row, boosters))

    def call(self, work: Callable[[], Any]) -> "Future[Any]":
        """Carry something out that needs the model. Raises :class:`BusyError` as :meth:`predict` does."""
        return self._put(_Job(Future(), work=work))

    def write(self, writing: Writing) -> "Future[None]":
        """Let the model go on with a text. Raises :class:`BusyError` as :meth:`predict` does."""
        return self.call(lambda: self._write(writing))

    def close(self) -> None:
        """Answer what waits, then let the model go."""
        self._jobs.put(None)
        self._thread.join()

    def _put(self, job: _Job) -> "Future[Any]":
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise BusyError(f"{MOST_WAITING} requests are waiting: ask again in a while") from None
        return job.done

    def _answer_all(self, opening: Callable[[], RunPredictor], opened: "Future[RunPredictor]") -> None:
        try:
            predictor = opening()
        except BaseException as error:
            opened.set_exception(error)
            return
        with predictor:
            opened.set_result(predictor)
            while (job := self._next()) is not None:
                jobs = [job] if job.work is not None else [job, *self._alike(job)]
                # Whoever gave up is not answered; from here on nobody can.
                wanted = [one for one in jobs if one.done.set_running_or_notify_cancel()]
                if not wanted:
                    continue
                if job.work is not None:
                    _carry_out(job, job.work)
                else:
                    self._predict(predictor, wanted)

    def _next(self) -> _Job | None:
        return self._ahead.popleft() if self._ahead else self._jobs.get()

    def _alike(self, first: _Job) -> list[_Job]:
        """What waits for the same boosters right behind a job."""
        jobs: list[_Job] = []
        while len(jobs) < TOGETHER - 1:
            try:
                job = self._ahead.popleft() if self._ahead else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None or job.work is not None or job.boosters != first.boosters:
                self._ahead.appendleft(job)
                break
            jobs.append(job)
        return jobs

    def _predict(self, predictor: RunPredictor, jobs: list[_Job]) -> None:
        try:
            with self.only(predictor, jobs[0].boosters):
                predictions = predictor.predictions([job.row for job in jobs if job.row is not None])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].done.set_exception(error)
                return
            for job in jobs:  # one of them is to blame: the others get their answers
                self._predict(predictor, [job])
            return
        for job, prediction in zip(jobs, predictions, strict=True):
            job.done.set_result(prediction)

    @staticmethod
    def only(predictor: RunPredictor, boosters: int | None) -> AbstractContextManager[None]:
        """Forwards inside the block see the first boosters alone; all of them where that is None."""
        return nullcontext() if boosters is None else predictor.ledger.adapters.first(boosters)

    @torch.inference_mode()
    def _write(self, writing: Writing) -> None:
        predictor, tokenizer = self.predictor, self.predictor.tokenizer
        prompt = torch.tensor([writing.prompt], device=predictor.base.device)
        drawn = DRAWN | {"temperature": writing.temperature} if writing.temperature else GREEDY
        pieces = _Pieces(tokenizer, writing)
        try:
            with self.only(predictor, writing.boosters):
                written = predictor.base.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=writing.most,
                    **drawn,
                    stop_strings=list(writing.stop) or None,
                    tokenizer=tokenizer,
                    pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                    streamer=pieces,
                    stopping_criteria=StoppingCriteriaList([_Left(writing.unwanted)]),
                )
            writing.tokens = written.shape[1] - prompt.shape[1]
            writing.stopped = writing.tokens < writing.most or pieces.ended
        finally:
            writing.pass_on(None)


def _carry_out(job: _Job, work: Callable[[], Any]) -> None:
    try:
        job.done.set_result(work())
    except Exception as error:
        job.done.set_exception(error)


class _Left(StoppingCriteria):
    """Stop once nobody reads any more."""

    def __init__(self, unwanted: threading.Event) -> None:
        self.unwanted = unwanted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.unwanted.is_set(), device=input_ids.device, dtype=torch.bool)


class _Pieces(TextStreamer):
    """transformers' streamer into a queue, up to the text that ends an answer."""

    def __init__(self, tokenizer: Any, writing: Writing) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.writing = writing
        self.held = ""
        """Not passed on yet: it may be the beginning of what ends the answer."""
        self.begun = self.ended = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.ended:
            return
        self.held += text
        for stop in self.writing.stop:
            if stop in self.held:
                self.held, self.ended = self.held.split(stop, 1)[0], True
        longest = max(map(len, self.writing.stop), default=1)
        ready = self.held if stream_end or self.ended else self.held[: len(self.held) - longest + 1]
        self.held = self.held[len(ready) :]
        ready = ready if self.begun or self.writing.raw else ready.lstrip()
        if ready:
            self.begun = True
            self.writing.text += ready
            self.writing.pass_on(ready)
