"""xgblora serve: a real process, asked by OpenAI's client, by a browser, by crowds and by strangers."""

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from conftest import Run, save_talking_model, write_rows
from test_chat import GREETED, TEMPLATE
from test_html_report import SCREENS, SCREENSHOTS, browser
from test_predict import CHATS
from xgblora import XgbloraError, load_run
from xgblora.cli import main
from xgblora.runs.conversation import ChatConfig, Conversation
from xgblora.runs.finished import UseConfig, open_finished, read_finished
from xgblora.serving.desk import BusyError, Desk
from xgblora.tasks import Chat

__all__ = ["browser"]  # a fixture

WRITTEN = """
data: {train: written.jsonl, test: written.jsonl}
prompt: "{{ text }}:"
answer: answer
generate: {max_new_tokens: 6, stop: "e"}
"""
PAIRS = """
data: {train: pairs.jsonl, test: pairs.jsonl}
prompt: "{{ premise }} So {{ claim }}?"
options: [Yes, No]
answer: label
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("served")
    data = root / "data"
    data.mkdir()
    for split, count in (("train", 60), ("validation", 20)):
        write_rows(data / f"{split}.jsonl", count)
    rows = [
        {"text": f"say {i}", "answer": str(i), "premise": "rain", "claim": f"wet {i}", "label": i % 2}
        for i in range(40)
    ]
    for name, task in (("written", WRITTEN), ("pairs", PAIRS)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (root / f"{name}.yaml").write_text(task, encoding="utf-8")
    model = f"--model_name {model_folder.as_posix()} --disable_tqdm true --use_cpu true --num_dev 10 --num_eval 10"
    boosted = "--xgblora --max_steps 6 --xgblora_steps_per_iteration 2 --learning_rate 0.1 --num_train 30"
    for name, flags in {
        "chosen": f"--data_dir {data.as_posix()} --task_name SST2",
        "written": f"--task_file {root / 'written.yaml'}",
        "pairs": f"--task_file {root / 'pairs.yaml'}",
    }.items():
        assert main(f"train {model} {boosted} {flags} --output_dir {root / name}".split()) == 0
    return root


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned conversations."""
    root = tmp_path_factory.mktemp("said")
    (root / "train.jsonl").write_text((json.dumps(GREETED) + "\n") * 12, encoding="utf-8")
    (root / "test.jsonl").write_text(json.dumps(GREETED) + "\n", encoding="utf-8")
    (root / "chats.yaml").write_text(CHATS, encoding="utf-8")
    model = root / "chatty"
    save_talking_model(model, TEMPLATE)
    flags = f"--model_name {model.as_posix()} --task_file {root / 'chats.yaml'} --max_steps 2 --use_cpu true"
    assert main(f"train {flags} --disable_tqdm true --output_dir {root / 'said'}".split()) == 0
    return root / "said"


STOPPED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)


class Server:
    """A process that serves a run."""

    def __init__(self, run: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "xgblora", "serve", str(run), "--port", "0", "--use_cpu", "true", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        assert self.process.stdout is not None
        printed = ""
        for line in self.process.stdout:
            printed += line
            if address := re.search(r"Serving .* on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(address[1])
                break
        else:
            raise AssertionError(printed)
        self.address = f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """One request as it is; the status and, of JSON, the content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body or None, {"Content-Type": "application/json"} | given)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def serve(runs: Path) -> Iterator[Callable[[str], Server]]:
    """Starts a server of a run, once; it is asked from then on."""
    servers: dict[str, Server] = {}

    def start(name: str) -> Server:
        if name not in servers:
            servers[name] = Server(runs / name)
        return servers[name]

    yield start
    for server in servers.values():
        server.stop()


TEXTS = ["a warm and funny film", "a dull mess", "hm"]


def test_an_openai_client_gets_what_predict_says(runs: Path, serve: Callable[[str], Server]) -> None:
    client = serve("chosen").client()
    assert [model.id for model in client.models.list()] == ["chosen", *(f"chosen:{count}" for count in range(4))]
    for count in (None, 0, 2):
        name = "chosen" if count is None else f"chosen:{count}"
        with load_run(runs / "chosen", boosters=count) as predictor:
            expected = predictor.predictions(TEXTS)
        for text, prediction in zip(TEXTS, expected, strict=True):
            answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": text}])
            assert answer.choices[0].message.content == prediction.answer
            assert answer.choices[0].model_extra is not None
            assert answer.choices[0].model_extra["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)


def test_a_text_may_come_in_parts_and_without_a_port(serve: Callable[[str], Server]) -> None:
    server = serve("chosen")

    def ask(content: Any, **headers: str) -> tuple[int, Any]:
        body = {"messages": [{"role": "user", "content": content}]}
        return server.send("POST", "/v1/chat/completions", json.dumps(body).encode(), **headers)

    (_, whole), (_, parts) = (
        ask("a dull mess"),
        ask([{"type": "text", "text": "a dull "}, {"type": "text", "text": "mess"}]),
    )
    assert whole["choices"] == parts["choices"]
    status, told = ask([{"type": "image_url", "image_url": {"url": "x"}}])
    assert (status, "messages.0.content" in told["error"]["message"]) == (400, True)
    assert ask("hm", Host="localhost")[0] == 200


def test_written_answers_are_those_of_predict_and_stream(runs: Path, serve: Callable[[str], Server]) -> None:
    client = serve("written").client()
    with load_run(runs / "written") as predictor:
        expected = predictor(TEXTS)
        (raw,) = predictor(["go on"])
    for text, answer in zip(TEXTS, expected, strict=True):
        messages: Any = [{"role": "user", "content": text}]
        whole = client.chat.completions.create(model="written", messages=messages)
        pieces = client.chat.completions.create(model="written", messages=messages, stream=True)
        assert whole.choices[0].message.content == answer
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces).strip() == answer
        assert whole.usage is not None
        assert 1 <= whole.usage.completion_tokens <= 6
    settings: dict[str, Any] = {"model": "written", "prompt": "go on:", "max_tokens": 6, "stop": "e"}
    text = client.completions.create(**settings).choices[0].text
    assert text.strip() == raw
    assert "".join(piece.choices[0].text for piece in client.completions.create(**settings, stream=True)) == text
    short = client.completions.create(model="written", prompt="go on:", max_tokens=1)
    assert short.choices[0].finish_reason == "length"


def test_rows_of_several_columns_are_objects(runs: Path, serve: Callable[[str], Server]) -> None:
    row = {"premise": "It rains", "claim": "it is wet"}
    with load_run(runs / "pairs") as predictor:
        (expected,) = predictor([row])
    server = serve("pairs")
    answer = server.client().chat.completions.create(
        model="pairs", messages=[{"role": "user", "content": json.dumps(row)}]
    )
    assert answer.choices[0].message.content == expected
    body = {"messages": [{"role": "user", "content": "It rains"}]}
    status, told = server.send("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert (status, told["error"]["message"]) == (
        400,
        "messages: this task asks by a JSON object with the columns claim, premise",
    )


@pytest.mark.soak
def test_a_conversation_goes_on(talking: Path) -> None:
    """Turn by turn, as ``xgblora chat`` does."""
    server = Server(talking)
    run = read_finished(talking)
    assert isinstance(run.task, Chat)
    with open_finished(run, ChatConfig(use_cpu=True)) as predictor:
        talk = Conversation(predictor, run.task, ChatConfig(max_new_tokens=8, use_cpu=True))
        expected = [talk.say(text, io.StringIO()) for text in ("hello", "and then?")]
    messages: list[Any] = []
    for text, answer in zip(("hello", "and then?"), expected, strict=True):
        messages.append({"role": "user", "content": text})
        made = server.client().chat.completions.create(model="said", messages=messages, max_tokens=8)
        assert made.choices[0].message.content == answer
        messages.append({"role": "assistant", "content": answer or "..."})
    assert server.stop() in STOPPED


def test_the_lines_of_the_docs_work(serve: Callable[[str], Server]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```text\n(from openai.*?)```", text, re.DOTALL)
    lines = lines.replace("http://127.0.0.1:8000", serve("chosen").address).replace('"packages"', '"chosen"')
    names: dict[str, Any] = {}
    exec(compile(lines.replace("client.chat", "answer = client.chat"), "docs/serve.md", "exec"), names)
    assert names["answer"].choices[0].message.content in ("great", "terrible")


def test_all_stages_come_at_once(runs: Path, serve: Callable[[str], Server]) -> None:
    status, stages = serve("chosen").send("POST", "/api/stages", json.dumps({"row": TEXTS[0]}).encode())
    assert status == 200
    for stage in stages:
        with load_run(runs / "chosen", boosters=stage["boosters"]) as predictor:
            (expected,) = predictor.predictions([TEXTS[0]])
        assert stage["answer"] == expected.answer
        assert stage["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert len({stage["probabilities"]["great"] for stage in stages}) == len(stages) == 4


GOOD = json.dumps({"messages": [{"role": "user", "content": "hm"}]}).encode()
HOSTILE: dict[str, tuple[tuple[str, str, bytes, dict[str, str]], int, str]] = {
    "no JSON": (("POST", "/v1/chat/completions", b'{"messages": [', {}), 400, "is no JSON"),
    "deep JSON": (("POST", "/v1/chat/completions", b"[" * 100_000, {}), 400, "is no JSON"),
    "10 MB": (("POST", "/v1/completions", json.dumps({"prompt": "x" * 10**7}).encode(), {}), 413, "1,000,000 bytes"),
    "other format": (("POST", "/v1/completions", b"prompt=x", {"Content_Type": "text/plain"}), 415, "send JSON"),
    "other site": (("POST", "/v1/chat/completions", GOOD, {"Origin": "http://evil.example"}), 403, "other sites"),
    "null origin": (("POST", "/v1/chat/completions", GOOD, {"Origin": "null"}), 403, "other sites"),
    "rebound name": (("GET", "/api/run", b"", {"Host": "evil.example:8000"}), 403, "answers as 127.0.0.1"),
    "no messages": (("POST", "/v1/chat/completions", b"{}", {}), 400, "messages: Field required"),
    "empty text": (("POST", "/v1/completions", b'{"prompt": ""}', {}), 400, "prompt: String should have"),
    "long text": (("POST", "/v1/completions", json.dumps({"prompt": "x" * 9999}).encode(), {}), 400, "the model takes"),
    "many tokens": (("POST", "/v1/completions", b'{"prompt": "x", "max_tokens": 1e9}', {}), 400, "max_tokens"),
    "hot": (("POST", "/v1/completions", b'{"prompt": "x", "temperature": 9}', {}), 400, "temperature"),
    "other model": (("POST", "/v1/completions", b'{"prompt": "x", "model": "gpt"}', {}), 404, "is not served here"),
    "9 boosters": (("POST", "/v1/completions", b'{"prompt": "x", "model": "chosen:9"}', {}), 404, "not served here"),
    "no column": (("POST", "/api/stages", b'{"row": {"words": "x"}}', {}), 400, "sentence"),
    "a number": (("POST", "/api/stages", b'{"row": 7}', {}), 400, "row"),
    "nowhere": (("GET", "/etc/passwd", b"", {}), 404, "Not Found"),
    "other verb": (("PUT", "/v1/completions", b"{}", {}), 405, "PUT is not answered"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_get_one_clear_answer(name: str, serve: Callable[[str], Server]) -> None:
    server = serve("chosen")
    (method, path, body, headers), status, words = HOSTILE[name]
    got, told = server.send(method, path, body, **headers)
    assert got == status, told
    assert words in told["error"]["message"]
    assert "\n" not in told["error"]["message"]
    assert server.send("POST", "/v1/chat/completions", GOOD)[0] == 200, "and it goes on"


def test_crowds_lose_nothing_and_memory_stays_flat(runs: Path, serve: Callable[[str], Server]) -> None:
    """200 clients, 2,000 requests."""
    server = serve("chosen")
    process = psutil.Process(server.process.pid)
    texts = [f"a film about {number}" for number in range(100)]
    with load_run(runs / "chosen") as predictor:
        expected = dict(zip(texts, predictor(texts), strict=True))

    def client(number: int) -> list[str]:
        wrong = []
        for turn in range(10):
            text = texts[(7 * number + turn) % len(texts)]
            body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
            status, told = server.send("POST", "/v1/chat/completions", body)
            if status != 200 or told["choices"][0]["message"]["content"] != expected[text]:
                wrong.append(f"{status}: {told}")
        return wrong

    with ThreadPoolExecutor(200) as crowd:
        for _ in crowd.map(client, range(20)):
            pass
        before = process.memory_info().rss
        wrong = [line for lines in crowd.map(client, range(200)) for line in lines]
    assert wrong == []
    assert process.memory_info().rss - before < 60e6


def test_a_reader_who_leaves_stops_the_writing(runs: Path, serve: Callable[[str], Server]) -> None:
    server = serve("written")
    body = json.dumps({"prompt": "on and on", "max_tokens": 100, "stream": True}).encode()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as left:
            left.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:1\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            left.recv(200)
    begun = time.monotonic()
    assert server.client().completions.create(model="written", prompt="go", max_tokens=1).choices[0].text is not None
    assert time.monotonic() - begun < 20


def test_it_ends_when_it_is_told_to(runs: Path) -> None:
    server = Server(runs / "chosen")
    with ThreadPoolExecutor(8) as crowd:
        waiting = [crowd.submit(server.send, "POST", "/v1/chat/completions", GOOD) for _ in range(8)]
        waiting[0].result()
        assert server.stop() in STOPPED
        for answer in waiting:
            assert answer.exception() is not None or answer.result()[0] == 200
    assert server.process.stdout is not None
    assert "Traceback" not in server.process.stdout.read()


def test_what_cannot_be_served_is_refused_in_a_line(runs: Path, run: Run, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", runs / "chosen", "--port", port)
        assert (code, err.count("\n")) == (2, 1)
        assert f"--port {port} cannot be had (Address already in use): choose another one" in err
    for argv, words in (
        ((tmp_path,), "holds no finished run"),
        ((runs / "chosen", "--boosters", "9"), "has 3 boosters"),
        ((runs / "chosen", "--port", "70000"), "--port must be 0 to 65535"),
        ((), "say which run"),
    ):
        code, _, err = run("serve", *argv)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err


PARTS = ("base", "some", "trained")


def until(page: Page, holds: Callable[[], bool]) -> None:
    """Wait for something on a page, whose policy forbids Playwright's own way."""
    for _ in range(300):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(page.inner_text("main"))


@pytest.mark.parametrize(("name", "screen"), [*(("chosen", screen) for screen in SCREENS), ("written", "desktop")])
def test_the_page_answers_in_a_browser(
    name: str, screen: str, serve: Callable[[str], Server], browser: Browser
) -> None:
    server = serve(name)
    page = browser.new_page(**SCREENS[screen])
    complaints: list[str] = []
    page.on("console", lambda line: complaints.append(f"{line.type}: {line.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.address)
    page.wait_for_selector("#fields textarea")
    page.click("#examples button >> nth=0")
    unanswered = ("", "-", "...")
    until(page, lambda: not any(page.inner_text(f"#{part}").strip() in unanswered for part in PARTS))
    assert page.input_value("textarea")
    if name == "chosen":
        before = page.inner_text("#some")
        page.focus("#boosters")
        page.keyboard.press("Home")
        assert page.inner_text("#count") == "0 of 3"
        assert page.inner_text("#some") == page.inner_text("#base")
        page.keyboard.press("End")
        assert page.inner_text("#some") == page.inner_text("#trained") != before
        shown = page.inner_text("#trained")
        page.fill("textarea", "another film")
        page.keyboard.press("Control+Enter")
        until(page, lambda: page.inner_text("#trained") != shown)
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"serve-{name}-{screen}.png", full_page=True)
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
    page.close()


def test_who_gives_up_is_left_out_and_the_others_are_answered(runs: Path) -> None:
    """A desk by itself: requests that were given up, one that fails, and those that wait behind them."""
    held = threading.Event()
    run = read_finished(runs / "chosen")
    desk = Desk(lambda: open_finished(run, UseConfig(use_cpu=True)))
    waiting = desk.call(lambda: held.wait(60))
    given_up, bad, good = (desk.predict(text) for text in ("a", {"words": "b"}, "c"))
    assert given_up.cancel()
    held.set()
    assert waiting.result(60) is True
    assert good.result(60).answer in ("great", "terrible")
    with pytest.raises(XgbloraError, match="sentence"):
        bad.result(60)
    assert desk.predict("d").result(60).answer in ("great", "terrible")
    desk.close()


def test_the_1001st_that_waits_is_told_so(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgblora.serving.desk.MOST_WAITING", 3)
    held = threading.Event()
    run = read_finished(runs / "chosen")
    desk = Desk(lambda: open_finished(run, UseConfig(use_cpu=True)))
    first = desk.call(lambda: held.wait(60))
    while not first.running():
        time.sleep(0.01)
    others = [desk.predict("a") for _ in range(3)]
    with pytest.raises(BusyError, match="3 requests are waiting: ask again"):
        desk.predict("b")
    held.set()
    assert [other.result(60).answer for other in others]
    desk.close()
