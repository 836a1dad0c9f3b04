"""What asking a served run costs: against a bare forward, and with many clients at once.

    python benchmarks/serving.py RUN [--clients 200] [--requests 2000]

RUN is a finished run with options and one column. ``xgblora serve RUN`` is started on a free port, and asked:

1. One request after the other, in turns with bare forwards of the same prompts by the same model in this process
   (``Base.scores``, all boosters on). Reported: medians and their ratio.
2. ``--requests`` by ``--clients`` threads. Reported: how many were lost, requests a second, resident memory after the
   first tenth and at the end.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import cycle, islice
from pathlib import Path

import psutil
import torch

from xgblora import load_run
from xgblora.learn.evaluate import evaluate
from xgblora.runs.finished import read_finished
from xgblora.serving.serve import example_rows
from xgblora.tasks import encode


def started(run: Path) -> tuple[subprocess.Popen[str], int]:
    """A server of the run, and its port."""
    command = [sys.executable, "-m", "xgblora", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    for line in process.stdout:
        if address := re.search(r"127\.0\.0\.1:(\d+)", line):
            return process, int(address[1])
    raise SystemExit("the server did not start")


def ask(port: int, text: str) -> int:
    """The status of one request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps({"messages": [{"role": "user", "content": text}]})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    finished = read_finished(args.run)
    rows = example_rows(finished)
    (column,) = finished.task.asking
    texts = [str(row[column]) for row in rows]
    process, port = started(args.run)
    try:
        asked, bare = [], []
        with load_run(args.run) as predictor:
            examples = encode(finished.task, rows, predictor.tokenizer, predictor.max_length, answered=False)
            for text, example in islice(cycle(zip(texts, examples, strict=True)), 40):
                begun = time.perf_counter()
                if ask(port, text) != 200:
                    raise SystemExit("a request failed")
                asked.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                with torch.inference_mode():
                    evaluate(predictor.base, [example])
                bare.append(time.perf_counter() - begun)
        here, there = (1000 * statistics.median(times[8:]) for times in (asked, bare))
        print(f"one request {here:.0f} ms, a bare forward {there:.0f} ms: ratio {here / there:.2f}")
        server = psutil.Process(process.pid)
        begun = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as crowd:
            first = list(crowd.map(lambda number: ask(port, texts[number % len(texts)]), range(args.requests // 10)))
            before = server.memory_info().rss
            rest = list(
                crowd.map(lambda number: ask(port, texts[number % len(texts)]), range(len(first), args.requests))
            )
        seconds = time.perf_counter() - begun
        lost = sum(status != 200 for status in first + rest)
        print(
            f"{args.requests:,} requests of {args.clients} clients: {lost} lost, {args.requests / seconds:.0f} a second"
        )
        after = server.memory_info().rss
        print(f"resident memory {before / 2**20:.0f} MB after a tenth, {after / 2**20:.0f} MB at the end")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
