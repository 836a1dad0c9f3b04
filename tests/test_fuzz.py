"""Thousands of inputs that nobody would write: each is taken, or refused in one line."""

import argparse
import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import byte_tokenizer
from xgblora import RunConfig, XgbloraError
from xgblora.cli.parsing import parse, parser
from xgblora.tasks import encode, get_task, load_splits

TOKENIZER = byte_tokenizer()
VALUES: list[Any] = [
    *(0, 1, -1, 2, 0.5, 1e400, -0.0, 2**70, "", " ", "a", "0", "1", "nan", "\x00", "\ufeff", "ß", "\u202e", "{{ x }}"),
    *(None, True, False, [], ["a"], {}, {"a": 1}, "x" * 5000, "\r\n", '"', "great", float("nan")),
]
BYTES = [
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b'"',
    b"'",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
    b"\t",
    b"PAR1",
]


def odd_rows(draw: random.Random) -> list[dict[str, Any]]:
    """A few rows in SST-2's columns, most of them as they should be."""
    rows = []
    for number in range(draw.randrange(0, 6)):
        row: dict[str, Any] = {"sentence": f"a film {number}", "label": number % 2}
        for _ in range(draw.choice((0, 0, 0, 1, 2))):
            row[draw.choice(("sentence", "label", "other", "", "Label"))] = draw.choice(VALUES)
        if draw.random() < 0.05:
            del row[draw.choice(list(row))]
        rows.append(row)
    return rows


def as_jsonl(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    end = draw.choice(("\n", "\r\n", "\n\n", "")) if draw.random() < 0.2 else "\n"
    return "".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + end for row in rows).encode(
        "utf-8", "surrogatepass"
    )


def as_csv(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["sentence", "label"]
    lines = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    quote, separator = draw.choice(('"{}"', "{}")), "," if draw.random() < 0.9 else ";"
    return "\n".join(separator.join(quote.format(cell) for cell in line) for line in lines).encode()


def as_parquet(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    file = io.BytesIO()
    columns = {name for row in rows for name in row}
    arrays = {name: [row.get(name) for row in rows] for name in sorted(columns)}
    try:
        pq.write_table(pa.table(arrays), file)
    except (pa.ArrowException, OverflowError):  # columns of several kinds
        pq.write_table(pa.table({name: list(map(str, values)) for name, values in arrays.items()}), file)
    return file.getvalue()


WRITERS = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Some bytes more, fewer, or others."""
    changed = bytearray(content)
    for _ in range(draw.choice((0, 0, 1, 2, 10))):
        place = draw.randrange(len(changed) + 1)
        how = draw.randrange(4)
        if how == 0:
            changed[place:place] = draw.choice(BYTES)
        elif how == 1:
            del changed[place : place + draw.randrange(1, 20)]
        elif how == 2 and changed:
            changed[place % len(changed)] = draw.randrange(256)
        else:
            changed = changed[:place]
    return bytes(changed)


def one_line(error: XgbloraError) -> None:
    assert str(error).strip()
    assert "\n" not in str(error), str(error)
    assert len(str(error)) < 1500, str(error)


def soaked(counts: range, quick: int) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.soak if n >= quick else ()) for n in counts]


@pytest.mark.parametrize("ending", list(WRITERS))
@pytest.mark.parametrize("seed", soaked(range(20), 1))
def test_data_files(ending: str, seed: int, tmp_path: Path) -> None:
    """100 of a kind: read, made questions of, tokenised."""
    taken = 0
    (tmp_path / "validation.jsonl").write_text('{"sentence": "a", "label": 0}\n', encoding="utf-8")
    for number in range(100):
        draw = random.Random(f"{ending} {seed} {number}")
        file = tmp_path / f"train.{ending}"
        file.write_bytes(damaged(WRITERS[ending](odd_rows(draw), draw), draw))
        try:
            rows = load_splits(get_task("SST2"), str(tmp_path))["train"]
            encode(get_task("SST2"), rows, TOKENIZER, 64)
        except XgbloraError as error:
            one_line(error)
        else:
            taken += 1
    assert 5 < taken < 95  # neither all good nor all bad


def test_text_that_is_not_utf8_is_refused_where_it_stands(tmp_path: Path) -> None:
    """Readers of Parquet do not look into text: the columns are checked when they are read."""
    file = tmp_path / "train.parquet"
    (tmp_path / "validation.jsonl").write_text('{"sentence": "a", "label": 0}\n', encoding="utf-8")
    table = pa.table({"sentence": ["good", "b##d", "fine"], "label": [1, 0, 1]})
    pq.write_table(table, file, compression="none", use_dictionary=False)
    file.write_bytes(file.read_bytes().replace(b"b##d", b"b\xff\xffd"))
    with pytest.raises(XgbloraError, match=r"column 'sentence': .*Invalid UTF8 sequence at string index 1") as refused:
        load_splits(get_task("SST2"), str(tmp_path))
    one_line(refused.value)


WORDS = [
    *("", "0", "1", "-1", "2", "0.5", "nan", "inf", "-inf", "1e400", "-0", "1e-320", "99999999999999999999", "true"),
    *("false", "None", "x", "no", "steps", "epoch", "zo", "regular", "none", "boost", "adamw_torch", "sgd", "linear"),
    *("accuracy", "json:dumps", "../..", "a b", "\x00", "ü", "[1]", "{}", '{"a": 1}', "per_example", "shared", "top"),
]


@pytest.mark.parametrize("seed", soaked(range(40), 2))
def test_configurations(seed: int) -> None:
    """100 command lines of one to four flags with any value; every tenth flag is one that is refused anyway."""
    actions = [action for action in parser(RunConfig, "train")._actions if action.option_strings[0] != "-h"]
    works = {True: [], False: []}
    for action in actions:
        works[action.help != argparse.SUPPRESS].append(action.option_strings[0])
    taken = 0
    for number in range(100):
        draw = random.Random(f"{seed} {number}")
        argv = [
            word
            for _ in range(draw.randrange(1, 5))
            for word in (draw.choice(works[draw.random() < 0.9]), draw.choice(WORDS))
        ]
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                parse(RunConfig, "train", argv)
            except XgbloraError as error:
                one_line(error)
            except Exception as error:
                raise AssertionError(f"{argv}: {error!r}") from error
            else:
                taken += 1
    assert 0 < taken < 95
