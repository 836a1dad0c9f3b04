"""What a template may do: all that texts need, and nothing that hangs, fills the memory or prints a list."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.models
import tokenizers.normalizers
from transformers import PreTrainedTokenizerFast

from conftest import ARCHITECTURES, build, byte_tokenizer
from xgblora import Base, XgbloraError, encode, load_splits, load_task
from xgblora.data.batch import OPTION_TOKENS, Example, build_batch
from xgblora.tasks import bounds
from xgblora.tasks.sandbox import LARGEST
from xgblora.tasks.templates import Compiled, columns_seen

ROW: dict[str, Any] = {
    "text": "a film\nof note",
    "big": "x" * 1_000_000,
    "list": ["a", "b"],
    "deep": {"a": [1, {"b": 2}]},
}

LOOP = "{% for i in range(99999) %}"
DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = TWICE %}{% endfor %}{{ n.x|tojson }}"


def render(template: str) -> str:
    text: str = Compiled("prompt", "mine", template)(columns_seen(ROW, ROW))
    return text


@pytest.mark.parametrize("number", ["9 ** 6000", "7 ** 4000 * 7 ** 4000", "9" * 5000])
def test_a_number_that_python_does_not_print_is_refused(number: str) -> None:
    """As options, as an answer and as a text: whoever shows it in a message would fail on it."""
    for template, expression in ((number, True), (f"[{number}]", True), ("{{ " + number + " }}", False)):
        with pytest.raises(XgbloraError) as refused:
            Compiled("options", "mine", template, expression)(columns_seen(ROW, ROW))
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ text | trim | upper }}", "A FILM\nOF NOTE"),
        ("{{ list | join(', ') }}", "a, b"),
        ("{{ list | map('upper') | join('-') }}", "A-B"),
        ("{{ list | tojson }}", '["a", "b"]'),
        ("{{ deep.a.1.b }}{{ list[0] }}", "2a"),
        ("{% for x in list %}{{ loop.index }}{{ x }}{% endfor %}", "1a2b"),
        ("{{ '%s of %s' % ('one', 2) }}{{ '{:>5}'.format('a') }}", "one of 2    a"),
        ("{{ text | replace('\\n', ' ') | truncate(9, true, '..', 0) }}", "a film .."),
        ("{{ 'ab' * 3 ~ 2 ** 5 }}", "ababab32"),
        ("{{ {'a': 'yes'}['a'] }}{{ (1, 2) | sum }}{{ [1, 2] | length }}", "yes32"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}", "<a>"),
        ("{{ (list | sort(reverse=true) | first).center(5) }}", "  b  "),
    ],
)
def test_what_texts_need_works(template: str, text: str) -> None:
    assert render(template) == text


@pytest.mark.parametrize(
    "template",
    [
        *(LOOP + LOOP + "{% endfor %}{% endfor %}", LOOP + "{% set x = big|title|lower|length %}{% endfor %}"),
        *("{{ 'x'|center(2000000000) }}", "{{ 'x'.center(2000000000) }}", "{{ text|indent(1000000000) }}"),
        *("{{ 'x' * 10**9 }}", "{{ big * 1000 }}", "{{ 10**(10**9) }}", "{{ '%999999999d' % 1 }}"),
        *("{{ '{:999999999}'.format(1) }}", "{{ '%999999999d'|format(1) }}", "{{ '%*d' % (10**9, 1) }}"),
        *("{{ big|replace('x', big) }}", "{{ big.replace('x', big) }}", "{{ big|join(big) }}", "{{ big.join(big) }}"),
        *("{{ range(99999)|map('string')|join(big) }}", "{{ big|wordwrap(1, wrapstring=big) }}", "{{ big }}" * 3),
        *(DOUBLED.replace("START", "'a'").replace("TWICE", twice) for twice in ("n.x ~ n.x", "n.x + n.x")),
        *(DOUBLED.replace("START", "list").replace("TWICE", twice) for twice in ("n.x + n.x", "[n.x, n.x]")),
        *(DOUBLED.replace("START", "list").replace("TWICE", twice) for twice in ("(n.x, n.x)", "{1: n.x, 2: n.x}")),
        *("{{ 'x'.zfill(10**9) }}", "{{ '\\t'.expandtabs(10**9) }}", "{{ lipsum(n=10**9) }}", "{{ big.encode() }}"),
        *(
            "{{ range(10**9)|list }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ text|random }}",
            "{{ big.translate({1: big}) }}",
        ),
        "{{ text }}" * 2501,
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_would_hang_or_fill_the_memory_is_refused(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(XgbloraError) as error:
        render(template)
    assert len(str(error.value)) < 300
    assert time.monotonic() - began < 60  # without bounds these never end


@pytest.mark.parametrize(
    "how", ["{{ list }}", "{{ 'x' ~ list }}", "{{ '%s' % list }}", "{{ '{}'.format(deep) }}", "{{ deep|string }}"]
)
def test_lists_and_objects_are_not_printed(how: str) -> None:
    with pytest.raises(XgbloraError, match=r"a template prints .*, which is no text"):
        render(how)


def test_somebodys_own_tracing_goes_on() -> None:
    def trace(*event: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        render("{{ text }}")
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


GOOD = "prompt: a\noptions: [b, c]\nanswer: d\n"


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        (
            "a: &a [x, x]\n"
            + "".join(f"b{n}: &b{n} [*{p}, *{p}]\n" for n, p in enumerate(["a", *(f"b{m}" for m in range(40))])),
            "aliases make more",
        ),
        ("options: &a [*a, *a]\n", "unconstructable recursive node"),
        ("options: " + "[" * 5000, "too deep"),
        ("prompt: " + "x" * 300_000, "more than 200,000 characters"),
    ],
)
def test_task_files_out_of_bounds_are_one_line(yaml: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml + GOOD, encoding="utf-8")
    with pytest.raises(XgbloraError, match=says) as error:
        load_task(tmp_path / "mine.yaml")
    assert "\n" not in str(error.value)


def test_aliases_that_repeat_little_are_read(tmp_path: Path) -> None:
    text = "data: {train: a.csv, test: b.csv}\nprompt: &p a\nnull_prompt: *p\noptions: [b, c]\nanswer: d\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert load_task(tmp_path / "mine.yaml").null_prompt == "a"  # type: ignore[union-attr]


LONG = "x" * (bounds.LONGEST_CELL + 1)
WIDE = range(bounds.MOST_COLUMNS + 1)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("train.csv", f"a,d\n{LONG},0\n", "a cell: a text has more than 1,000,000 characters"),
        ("train.csv", f'a,d\n"{LONG}",0\n', "a cell: a text has more than 1,000,000 characters"),
        ("train.csv", ",".join(f"c{n}" for n in WIDE) + "\n", "more than 10,000 columns"),
        ("train.csv", f"a,d\n{LONG * 11}", "a line of more than 10,000,000 characters"),
        ("train.jsonl", json.dumps({"a": LONG, "d": 0}) + "\n", "row 1: a text has more than 1,000,000 characters"),
        ("train.jsonl", json.dumps({f"c{n}": 0 for n in WIDE}) + "\n", "more than 10,000 columns"),
        ("train.jsonl", "".join(json.dumps({f"c{n}": 0}) + "\n" for n in WIDE), "more than 10,000 columns"),
    ],
)
def test_data_files_out_of_bounds_are_one_line(file: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"a": "a", "d": 0}\n', encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(f"data: {{train: {file}, test: test.jsonl}}\n{GOOD}", encoding="utf-8")
    with pytest.raises(XgbloraError, match=says):
        load_splits(load_task(tmp_path / "mine.yaml"))


# Many options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["choice {} x", "{}", "é{}"])
def test_options_that_rows_share_are_encoded_as_each_would_be(option: str, tmp_path: Path) -> None:
    names = [option.format(n) for n in range(200)]
    rows = [{"a": f"a film {n}{'.' * (n % 3)}", "d": n} for n in range(12)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    few = "prompt: '{{ a }} is'\nanswer: d\ndata: {train: train.jsonl, test: test.jsonl}\noptions: "
    (tmp_path / "many.yaml").write_text(few + json.dumps(names), encoding="utf-8")
    task, tokenizer = load_task(tmp_path / "many.yaml"), byte_tokenizer()
    examples = encode(task, load_splits(task)["train"], tokenizer, 512)
    for row, example in zip(rows, examples, strict=True):
        for name, ids in zip(names, example.options, strict=True):
            assert [*example.prompt, *ids] == tokenizer(f"{row['a']} is {name}")["input_ids"]


def test_many_options_take_several_rows_and_score_alike() -> None:
    model = build(ARCHITECTURES["llama"])
    prompt = list(range(20, 30))
    options = [[40 + n % 200, 41 + n // 200, 42] for n in range(300)]
    batch = build_batch([Example(prompt, options, 7), Example(prompt[:4], [[5, 6], [7]], 0)])
    lengths = batch.slot.div(batch.longest, rounding_mode="floor").bincount()
    assert batch.rows == 4  # 600 tokens of options, 256 in a row
    assert lengths.max() <= len(prompt) + OPTION_TOKENS
    from xgblora import OptionLoss

    packed, padded = (
        OptionLoss().scores(Base(model, packed), build_batch(list(batch.examples), packed)) for packed in (True, False)
    )
    assert (packed[0] - padded[0]).abs().max() < 1e-4
    assert (packed[1, :2] - padded[1, :2]).abs().max() < 1e-4


def test_the_bound_of_a_template_leaves_room_for_a_prompt_of_the_longest_cell() -> None:
    assert bounds.LONGEST_CELL < LARGEST
    assert len(render("{{ big }} It was")) == bounds.LONGEST_CELL + 7


def test_an_option_that_comes_out_otherwise_behind_a_prompt_is_encoded_there(tmp_path: Path) -> None:
    """Prompts may end alike and still not be followed by the same tokens: one that reaches over the seam, here."""
    word = "A_very_long_word▁is▁o"
    letters = ["<unk>", *dict.fromkeys(f"▁{word}AB0123456789")]
    merges = [(word[:end], word[end]) for end in range(1, len(word))]
    vocabulary = {piece: n for n, piece in enumerate([*letters, *("".join(pair) for pair in merges)])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>"))
    raw.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    rows = [{"a": f"{first}_very_long_word", "d": n} for n, first in enumerate("BAB")]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = "prompt: '{{ a }} is'\nanswer: d\ndata: {train: train.jsonl, test: test.jsonl}\noptions: "
    (tmp_path / "many.yaml").write_text(text + json.dumps([f"o{n}" for n in range(100)]), encoding="utf-8")
    task = load_task(tmp_path / "many.yaml")
    many = encode(task, load_splits(task)["train"], tokenizer, 512)
    (tmp_path / "few.yaml").write_text(text + json.dumps([f"o{n}" for n in range(20)]), encoding="utf-8")
    few = encode(load_task(tmp_path / "few.yaml"), rows, tokenizer, 512)
    assert [example.options[:20] for example in many] == [example.options for example in few]
    assert many[0].options[0] != many[1].options[0]
    assert many[0].options[0] == many[2].options[0]
