"""Inputs made to hang, or to fill the memory, and a process that takes one of them within bounds."""

import io
import json
import random
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xgblora import XgbloraError, load_model, load_splits, load_task
from xgblora.tasks.bounds import LARGEST_TASK_FILE, LONGEST_CELL, MOST_COLUMNS

SECONDS = 5
MEGABYTES = 500
TAKEN, REFUSED, WRONG, TOO_LARGE = 0, 3, 4, 5

TASK = """data: {train: FILE, test: test.jsonl}
prompt: "TEMPLATE"
options: OPTIONS
answer: label
"""
ROW = '{"text": "a film", "label": 0, "list": ["a", "b"], "number": 7}\n'

HUGE = ["2000000000", "10**9", "10**10**10", "99999", "-1", "0", "1e308", "'9'*9"]
TEXTS = ["text", "'x'", "text ~ text", "text * 1000", "list", "number", "[list, list]", "(text, list)", "{'a': list}"]
FILTERS = [
    *(
        "trim",
        "upper",
        "list",
        "string",
        "tojson",
        "length",
        "center(N)",
        "indent(N)",
        "join(text)",
        "replace('', text)",
    ),
    *("wordwrap(N)", "format(N)", "truncate(N)", "batch(N)", "slice(N)", "round(N)", "sum", "sort", "unique", "int"),
    *("map('center', N)", "urlize", "title", "xmlattr", "random", "first", "last", "reverse", "select", "groupby('a')"),
]
METHODS = ["center(N)", "ljust(N)", "zfill(N)", "replace('', text)", "join(list)", "format(N)", "encode()", "split()"]
LOOPS = ["range(N)", "text", "list", "range(99999)", "range(0, N, 3)"]


def odd_expression(draw: random.Random) -> str:
    """A text with filters, methods and numbers that nobody means well."""
    made = draw.choice(TEXTS)
    for _ in range(draw.randrange(4)):
        how = draw.randrange(4)
        if how == 0:
            made = f"({made})|{draw.choice(FILTERS)}"
        elif how == 1:
            made = f"({made}).{draw.choice(METHODS)}"
        elif how == 2:
            made = f"({made}) {draw.choice(('*', '**', '+', '%', '~'))} ({draw.choice((*TEXTS, 'N'))})"
        else:
            made = draw.choice((f"'%{'9' * draw.randrange(12)}d' % ({made})", f"'{{:999999999}}'.format({made})"))
    return made.replace("N", draw.choice(HUGE))


def odd_template(draw: random.Random) -> str:
    """Expressions inside of loops, macros and doublings."""
    made = "{{ " + odd_expression(draw) + " }}"
    for _ in range(draw.randrange(4)):
        how = draw.randrange(4)
        if how == 0:
            made = "{% for i in " + draw.choice(LOOPS).replace("N", draw.choice(HUGE)) + " %}" + made + "{% endfor %}"
        elif how == 1:
            double = draw.choice(("n.x ~ n.x", "n.x + n.x", "[n.x, n.x]", "(n.x, n.x)", "{'a': n.x, 'b': n.x}"))
            start = draw.choice(("text", "list"))
            made = "{% set n = namespace(x=" + start + ") %}{% for i in range(64) %}{% set n.x = " + double
            made += " %}{% endfor %}{{ n.x" + draw.choice(("", "|tojson", "|length", "|string")) + " }}"
        elif how == 2:
            made = "{% macro f(x) %}" + made + draw.choice(("", "{{ f(x) }}{{ f(x) }}")) + "{% endmacro %}{{ f(1) }}"
        else:
            made *= draw.choice((2, 100))
    return made


def odd_yaml(draw: random.Random) -> str:
    """Aliases of aliases, deep brackets, large files."""
    how = draw.randrange(5)
    if how == 0:
        lines = ["a0: &a0 [x, x, x]"]
        lines += [
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * draw.choice((2, 9)))}]" for n in range(1, draw.choice((9, 40)))
        ]
        return "\n".join(lines)
    if how == 1:
        return draw.choice(("options: ", "prompt: ", "")) + draw.choice("[{") * draw.choice((10, 1000, 5000, 100_000))
    if how == 2:
        return "options: &a [*a, *a]\nprompt: x\nanswer: y\n"
    if how == 3:
        return TASK.replace("OPTIONS", str([f"o{n}" for n in range(draw.choice((10, 10_000, 100_000)))]))
    return TASK + "num_dev: " + draw.choice("19") * draw.choice((3, 30, 5000, LARGEST_TASK_FILE + 1))


def odd_data(draw: random.Random, ending: str) -> bytes:
    """Cells, lines, nestings and numbers of columns beyond any use."""
    size = draw.choice((10, LONGEST_CELL - 100, LONGEST_CELL + 1, 20_000_000))
    columns = draw.choice((1, 100, MOST_COLUMNS + 1, 200_000))
    how = draw.randrange(3)
    if ending == "parquet":
        table = {"text": ["x" * size], "label": [0]} if how else {f"c{n}": [0] for n in range(min(columns, 20_000))}
        file = io.BytesIO()
        pq.write_table(pa.table(table), file)
        return file.getvalue()
    if ending == "csv":
        if how == 0:
            return (",".join(f"c{n}" for n in range(columns)) + "\n" + ",".join("0" * columns) + "\n").encode()
        quote = draw.choice(('"', ""))
        return f"text,label\n{quote}{'x' * size}{draw.choice((quote, ''))},0\n".encode()
    if how == 0:
        return (json.dumps({f"c{n}": 0 for n in range(columns)}) + "\n").encode()
    if how == 1:
        return ('{"text": ' + "[" * draw.choice((10, 500, 100_000)) + "\n").encode()
    return (json.dumps({"text": "x" * size, "label": 0}) + "\n").encode()


def odd_gguf(draw: random.Random) -> bytes:
    """A header with sizes from anywhere."""

    def number(most: int = 64) -> int:
        return draw.choice((0, 1, 3, draw.getrandbits(20), draw.getrandbits(most), 2 ** (most - 3)))

    content = b"GGUF" + struct.pack("<IQQ", 3, draw.choice((0, 1, number())), draw.choice((1, 2, number())))
    for _ in range(draw.randrange(4)):
        content += struct.pack("<Q", draw.choice((5, 5, number()))) + b"llama" + struct.pack("<I", draw.randrange(14))
        content += struct.pack("<IQ", draw.randrange(14), number()) + draw.randbytes(draw.randrange(40))
    return content


def attempt(kind: str, seed: int, folder: Path) -> Any:
    """Prepare an input; returns what takes it."""
    draw = random.Random(f"{kind} {seed}")
    (folder / "test.jsonl").write_text(ROW, encoding="utf-8")
    (folder / "train.jsonl").write_text(ROW * 2, encoding="utf-8")
    task, file = TASK.replace("OPTIONS", "[good, bad]"), "train.jsonl"
    if kind == "gguf":
        (folder / "odd.gguf").write_bytes(odd_gguf(draw))
        return lambda: load_model(str(folder / "odd.gguf"))
    if kind in ("csv", "jsonl", "parquet"):
        file = f"odd.{kind}"
        (folder / file).write_bytes(odd_data(draw, kind))
    if kind == "yaml":
        task = odd_yaml(draw)
    template = json.dumps(odd_template(draw))[1:-1] if kind == "template" else "{{ text }}"
    options = json.dumps(odd_expression(draw)) if kind == "expression" else "[good, bad]"
    task = task.replace("FILE", file).replace("TEMPLATE", template).replace("OPTIONS", options)
    (folder / "mine.yaml").write_text(task.replace("[good, bad]", options), encoding="utf-8")
    return lambda: load_splits(load_task(folder / "mine.yaml"))


def _used() -> int:
    """Seconds that this process has worked so far, rounded down."""
    return int(time.process_time())


def child(kind: str, seed: int, folder: str) -> None:
    """Take one input with bounds that the system sets; says by its exit code what became of it."""
    import resource
    import signal

    taken = attempt(kind, seed, Path(folder))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + _used(), SECONDS + _used()))
    signal.alarm(20 * SECONDS)  # also where it waits instead of working
    code = TAKEN
    try:
        taken()
    except XgbloraError as error:
        line = str(error)
        code = REFUSED if line.strip() and "\n" not in line and len(line) < 1500 else WRONG
    except BaseException:  # a traceback that a user would see
        (Path(folder) / "traceback").write_text(traceback.format_exc(), encoding="utf-8")
        code = WRONG
    if code != WRONG and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 1000 * MEGABYTES:
        code = TOO_LARGE
    sys.exit(code)


KINDS = ("template", "expression", "yaml", "csv", "jsonl", "parquet", "gguf")
