"""What is answered under which address."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from xgblora.errors import XgbloraError, one_line
from xgblora.learn.evaluate import evaluate_stages
from xgblora.learn.predictor import Prediction
from xgblora.serving.desk import BusyError, Desk, Writing
from xgblora.serving.guard import Guard
from xgblora.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    StagesRequest,
    chat_answer,
    chat_piece,
    completion_answer,
    completion_piece,
    identity,
    problem,
)
from xgblora.tasks import Chat, Task, encode

SITE = files("xgblora.serving") / "site"
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Served:
    """A run, as it is served."""

    name: str
    """What clients call its model."""
    task: Task | Chat
    boosters: int
    examples: Sequence[dict[str, Any]]
    """Rows to try."""


class UnknownModelError(XgbloraError):
    """A client asks for a model that is not served."""


def make_app(served: Served, desk: Desk) -> FastAPI:
    """The server of one run.

    Args:
        served: The run.
        desk: Answers for it.
    """
    app = FastAPI(title=f"xgblora serve {served.name}", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)  # type: ignore[arg-type]  # starlette wants a factory, which a class is
    answers = _Answers(served, desk)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(_page(), headers={"Content-Security-Policy": POLICY})

    @app.get("/api/run")
    async def run() -> dict[str, Any]:
        return {
            "name": served.name,
            "task": served.task.name,
            "columns": [] if isinstance(served.task, Chat) else list(served.task.asking),
            "boosters": served.boosters,
            "writes": served.task.generation is not None,
            "examples": list(served.examples),
        }

    @app.post("/api/stages")
    async def stages(asked: StagesRequest) -> list[dict[str, Any]]:
        return await answers.stages(asked.row)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [served.name, *(f"{served.name}:{count}" for count in range(served.boosters + 1))]
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "xgblora"} for name in names]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest) -> Any:
        return await answers.chat(asked)

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest) -> Any:
        return await answers.completion(asked)

    _answer_errors(app)
    return app


def _page() -> str:
    parts = {name: (SITE / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return parts["html"].replace("/*css*/", parts["css"]).replace("/*js*/", parts["js"])


def _answer_errors(app: FastAPI) -> None:
    """One line for each, in the shape that clients show."""

    @app.exception_handler(XgbloraError)
    async def refused(request: Request, error: XgbloraError) -> JSONResponse:
        status = 503 if isinstance(error, BusyError) else 404 if isinstance(error, UnknownModelError) else 400
        kind = "overloaded_error" if status == 503 else "invalid_request_error"
        return JSONResponse(problem(str(error), kind), status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(problem(f"{place or 'the request'}: {first['msg']}"), 400)

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(problem(f"{request.method} {request.url.path}: {error.detail}"), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(problem(f"the model failed: {one_line(error)}", "server_error"), 500)


class _Answers:
    def __init__(self, served: Served, desk: Desk) -> None:
        self.served, self.desk = served, desk

    async def stages(self, row: dict[str, Any] | str) -> list[dict[str, Any]]:
        """What the base and the first 1, 2, ... boosters choose, in one pass."""
        task = self.served.task
        if not isinstance(task, Task) or task.generation is not None:
            raise XgbloraError("this run writes its answers: ask /v1/chat/completions")
        asked = task.asked(row)
        task.check(asked, answered=False)
        options = [option.strip() for option in task.question(asked, answered=False).options]

        def work() -> list[Any]:
            predictor = self.desk.predictor
            examples = encode(task, [asked], predictor.tokenizer, predictor.max_length, answered=False)
            predictor.base.require_known(examples)
            return evaluate_stages(predictor.ledger.adapters, examples)

        scored = await asyncio.wrap_future(self.desk.call(work))
        return [
            {
                "boosters": count,
                "answer": options[stage.predictions[0]],
                "probabilities": dict(zip(options, stage.probabilities[0].tolist(), strict=True)),
            }
            for count, stage in enumerate(scored)
        ]

    async def chat(self, asked: ChatRequest) -> Any:
        """What ``xgblora predict`` says of the last message; of a run that learned conversations, the next turn."""
        task, (model, boosters) = self.served.task, self._model(asked.model)
        most = asked.max_tokens or asked.max_completion_tokens
        if isinstance(task, Task) and task.generation is None:
            row = self._row(task, asked.messages[-1].content)
            prediction: Prediction = await asyncio.wrap_future(self.desk.predict(row, boosters))
            more = {"probabilities": prediction.probabilities}
            if asked.stream:
                return _events(_whole(model, prediction.answer))
            return chat_answer(model, prediction.answer, "stop", self._used(row, prediction.answer), more)
        assert task.generation is not None
        writing = Writing(
            self._prompt(asked),
            most or task.generation.max_new_tokens,
            (task.generation.stop,) if task.generation.stop else (),
            asked.temperature,
            boosters,
        )
        if asked.stream:
            return _events(self._streamed(model, writing))
        await asyncio.wrap_future(self.desk.write(writing))
        used = len(writing.prompt), writing.tokens
        return chat_answer(model, writing.text.strip(), _reason(writing), used, {})

    async def completion(self, asked: CompletionRequest) -> Any:
        """How the model goes on with a text as it is."""
        model, boosters = self._model(asked.model)
        predictor = self.desk.predictor
        prompt = predictor.tokenizer(asked.prompt)["input_ids"]
        room = predictor.max_length - asked.max_tokens
        if not 0 < len(prompt) <= room:
            raise XgbloraError(
                f"prompt: {len(prompt):,} tokens, and max_tokens {asked.max_tokens}: the model takes "
                f"{predictor.max_length:,} together"
            )
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        writing = Writing(prompt, asked.max_tokens, tuple(filter(None, stop)), asked.temperature, boosters, raw=True)
        if asked.stream:
            return _events(self._streamed(model, writing))
        await asyncio.wrap_future(self.desk.write(writing))
        return completion_answer(model, writing.text, _reason(writing), (len(prompt), writing.tokens))

    def _model(self, name: str | None) -> tuple[str, int | None]:
        """The model that a client names, and how many boosters it has."""
        served, _, count = (name or self.served.name).rpartition(":")
        if name in (None, self.served.name):
            return self.served.name, None
        if served == self.served.name and count.isdecimal() and int(count) <= self.served.boosters:
            return str(name), int(count)
        ours = self.served.name
        raise UnknownModelError(f"model: {name} is not served here, {ours} is, or {ours}:K with its first K boosters")

    def _row(self, task: Task, content: str) -> dict[str, Any]:
        """The row that a message means: a text, or where several columns are asked for, a JSON object of them."""
        row = dict(task.asked(content)) if len(task.asking) == 1 else _object(content)
        if row is None:
            raise XgbloraError(f"messages: this task asks by a JSON object with the columns {', '.join(task.asking)}")
        task.check(row, answered=False)
        return row

    def _prompt(self, asked: ChatRequest) -> list[int]:
        task, predictor = self.served.task, self.desk.predictor
        if isinstance(task, Chat):
            row: dict[str, Any] = {task.columns[0]: [message.model_dump() for message in asked.messages]}
            task.check(row, answered=False)
        else:
            row = self._row(task, asked.messages[-1].content)
        (example,) = encode(task, [row], predictor.tokenizer, predictor.max_length, answered=False)
        return list(example.prompt)

    def _used(self, row: dict[str, Any], answer: str) -> tuple[int, int]:
        tokenizer = self.desk.predictor.tokenizer
        prompt = self.served.task.question(row, answered=False).prompt if isinstance(self.served.task, Task) else ""
        return len(tokenizer(prompt)["input_ids"]), len(tokenizer(answer)["input_ids"])

    async def _streamed(self, model: str, writing: Writing) -> AsyncIterator[dict[str, Any]]:
        """The pieces of what is written, in the shape of the request."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        shape = completion_piece if writing.raw else chat_piece
        name = identity("cmpl" if writing.raw else "chatcmpl")
        writing.pass_on = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        written = self.desk.write(writing)
        try:
            while (piece := await pieces.get()) is not None:
                yield shape(name, model, piece)
            await asyncio.wrap_future(written)
            yield shape(name, model, "", _reason(writing))
        finally:
            writing.unwanted.set()


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _reason(writing: Writing) -> str:
    return "stop" if writing.stopped else "length"


async def _whole(model: str, text: str) -> AsyncIterator[dict[str, Any]]:
    name = identity("chatcmpl")
    yield chat_piece(name, model, text)
    yield chat_piece(name, model, "", "stop")


def _events(pieces: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Server-sent events, as OpenAI's clients read them."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for piece in pieces:
                yield f"data: {json.dumps(piece)}\n\n"
        except XgbloraError as error:
            yield f"data: {json.dumps(problem(str(error)))}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
