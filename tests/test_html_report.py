"""report.html, opened in a real browser from its file, with the network off."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from conftest import Run, write_rows
from xgblora.cli import main
from xgblora.report import REPORT, AnsweredRow, RunResult, RunView, read_answers, write_report
from xgblora.report.answers import Answer, Bin, calibration, calibration_error, changed_most, confusion
from xgblora.report.curve_charts import booster_charts
from xgblora.report.paired import paired_difference
from xgblora.report.sections import content
from xgblora.report.view import first_unit, over_work, smoothed
from xgblora.runs.html_report import read_view

SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"
"""What people look at afterwards."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = bool(os.environ.get("XGBLORA_BROWSER_TESTS"))
"""Whether a machine without a browser fails these tests; else they are skipped there."""
MOST_BYTES = 6_000_000
SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True},
}
WRITTEN = """
data: {train: rows.jsonl, test: rows.jsonl}
prompt: "{{ text }} </script><script>document.title = 'taken'</script>"
answer: answer
generate: {max_new_tokens: 4}
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """Folders of runs of every kind, by its name."""
    root = tmp_path_factory.mktemp("reports")
    data = root / "data"
    data.mkdir()
    for split, count in (("train", 60), ("validation", 20)):
        write_rows(data / f"{split}.jsonl", count)
    rows = [{"text": f"say {number}", "answer": str(number % 3)} for number in range(40)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "mine.yaml").write_text(WRITTEN, encoding="utf-8")
    (root / "other.txt").write_text("other text\n\nand more of it\n", encoding="utf-8")
    model = f"--model_name {model_folder.as_posix()} --disable_tqdm true --use_cpu true --num_dev 10 --num_eval 20"
    sst2 = f"{model} --data_dir {data.as_posix()} --task_name SST2 --num_train 50"
    steps = "--max_steps 12 --xgblora_steps_per_iteration 4 --eval_steps 4 --logging_steps 1 --learning_rate 1e-2"
    commands = {
        "run": f"train {sst2} --lora --max_steps 4 --other_text {(root / 'other.txt').as_posix()} --output_dir",
        "boost": f"train {sst2} --recipe boost --boost_boosters 3 --eval_strategy steps --output_dir",
        "comparison": f"compare {sst2} {steps} --lora_rank 1 --seeds 0 1 2 --output_root",
        "text": f"train {model} --task_file {root / 'mine.yaml'} --num_train 20 --lora --max_steps 4 --output_dir",
    }
    for name, command in commands.items():
        assert main([*command.split(), str(root / name)]) == 0, name
    return {name: root / name for name in commands}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        assert not NEEDED, "there is no Chromium: apt-get install chromium"
        pytest.skip("there is no Chromium (apt-get install chromium)")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet.split())
        yield started
        started.close()


class Opened:
    """A page, and all that it complained of or asked the network for."""

    def __init__(self, browser: Browser, file: Path, screen: str) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page: Page = browser.new_page(offline=True, **SCREENS[screen])
        self.page.on("console", lambda line: self.complaints.append(f"{line.type}: {line.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.plot:not(:empty)').length > 0")

    def drawn(self) -> dict[str, int]:
        """Points of every chart that is shown."""
        counts = (
            "[...document.querySelectorAll('.plot')].filter(p => p.offsetParent).map(p => [p.id, "
            "(p.data || []).reduce((n, t) => n + (t.z ? t.z.flat() : t.x).length, 0)])"
        )
        return dict(self.page.evaluate(counts))


@pytest.mark.parametrize(
    ("kind", "screen"),
    [
        ("comparison", "desktop"),
        ("comparison", "phone"),
        pytest.param("comparison", "dark", marks=pytest.mark.soak),
        ("boost", "dark"),
        pytest.param("boost", "phone", marks=pytest.mark.soak),
        ("run", "desktop"),
        ("text", "desktop"),
    ],
)
def test_every_page_is_whole_quiet_and_accessible(
    reports: dict[str, Path], browser: Browser, kind: str, screen: str
) -> None:
    file = reports[kind] / REPORT
    assert file.stat().st_size < MOST_BYTES
    opened = Opened(browser, file, screen)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    opened.page.screenshot(path=SCREENSHOTS / f"report-{kind}-{screen}.png", full_page=True)
    assert opened.page.title() != "taken"
    assert opened.complaints == []
    assert {address.partition(":")[0] for address in opened.asked} <= {"file", "data", "blob"}
    points = opened.drawn()
    assert points
    assert all(points.values()), points
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    opened.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    result = Axe().run(opened.page)
    assert result.violations_count == 0, result.generate_report()
    opened.page.close()


def test_no_text_of_a_row_becomes_a_part_of_the_page(
    reports: dict[str, Path], browser: Browser, tmp_path: Path
) -> None:
    evil = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    answer = Answer(evil, True, 0.5, 0.5)
    row = AnsweredRow(evil, (evil,), answer, replace(answer, of_right=0.9))
    write_report([replace(read_view(reports["boost"]), answers=[row])], tmp_path / REPORT)
    opened = Opened(browser, tmp_path / REPORT, "desktop")
    assert opened.page.title() != "taken"
    assert opened.complaints == []
    assert evil in opened.page.inner_text(".changed tbody")
    opened.page.close()


@pytest.mark.parametrize("kind", ["run", "boost", "comparison", "text"])
def test_the_numbers_are_those_of_the_metrics(reports: dict[str, Path], browser: Browser, kind: str) -> None:
    opened = Opened(browser, reports[kind] / REPORT, "desktop")
    files = sorted(reports[kind].glob("**/metrics.json"))
    metrics = {(m["method"], m["seed"]): m for m in (json.loads(f.read_text(encoding="utf-8")) for f in files)}
    told = opened.page.evaluate("JSON.parse(document.getElementById('metrics').textContent)")
    assert {(m["method"], m["seed"]): m for m in told} == metrics
    read = opened.page.evaluate("[...document.querySelectorAll('data')].map(d => [d.dataset, d.value, d.textContent])")
    assert len(read) >= 7 * len(files)
    for where, value, shown in read:
        expected = told[int(where["run"])][where["metric"]]
        assert float(value) == expected
        factor = 100 if "%" in shown else 1
        number = float(re.sub(r"[^0-9.\-]", "", shown))
        assert number == pytest.approx(factor * expected, abs=0.51 * 10 ** -len(shown.partition(".")[2].split(" ")[0]))
    lead = opened.page.inner_text(".lead")
    if len(files) == 1:
        assert f"{100 * told[0]['zero_shot_accuracy']:.1f} → {100 * told[0]['accuracy']:.1f} %" in lead
    opened.page.close()


def test_curves_can_be_seen_over_other_work_and_in_the_other_theme(reports: dict[str, Path], browser: Browser) -> None:
    opened = Opened(browser, reports["comparison"] / REPORT, "desktop")
    page = opened.page
    last = "Math.max(...document.getElementById('dev').data[0].x)"
    title = "document.getElementById('dev').layout.xaxis.title.text"
    assert (page.evaluate(last), page.evaluate(title)) == (12, "training steps")
    metrics = page.evaluate("JSON.parse(document.getElementById('metrics').textContent)")[0]
    page.focus("#dev >> xpath=../fieldset//input[@value='steps']")
    page.keyboard.press("ArrowRight")  # by keyboard
    assert (page.evaluate(last), page.evaluate(title)) == (metrics["forward_sequences"], "examples forwarded")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(last) == pytest.approx(metrics["training_seconds"], rel=1e-4)
    ink = "document.getElementById('dev').layout.font.color"
    before = page.evaluate(ink)
    page.click("#theme")
    assert page.evaluate(ink) != before
    assert opened.complaints == []
    page.close()


def test_methods_keep_their_colour_and_steps_of_other_sizes_are_not_put_side_by_side(reports: dict[str, Path]) -> None:
    runs = sorted(
        (read_view(file.parent) for file in reports["comparison"].glob("*/metrics.json")), key=lambda v: v.name
    )
    charts = {chart.name: chart for chart in content(runs).charts}
    colours = {trace["y"][0]: trace["marker"]["color"] for trace in charts["accuracy"].traces}
    for trace in charts["difference"].traces:
        assert trace["marker"]["color"] == colours[trace["y"][0]]
    trained = [run for run in runs if run.result.trainer != "none"]
    assert charts["loss"].unit == charts["dev"].unit == first_unit(trained) == "steps"
    assert first_unit([*trained, read_view(reports["boost"])]) == "examples"


def test_every_run_of_a_comparison_can_be_looked_at(reports: dict[str, Path], browser: Browser) -> None:
    opened = Opened(browser, reports["comparison"] / REPORT, "desktop")
    page = opened.page
    names = page.evaluate("[...document.querySelectorAll('#run option')].map(o => o.textContent)")
    assert len(names) == 9
    for place, name in enumerate(names):
        page.select_option("#run", str(place))
        shown = page.evaluate("[...document.querySelectorAll('.part')].filter(p => p.offsetParent).map(p => p.id)")
        assert shown == [f"part-{place}"]
        assert name in page.inner_text(f"#part-{place} h2 >> nth=0")
        assert all(opened.drawn().values())
    assert opened.complaints == []
    page.close()


def test_boosters_are_seen_layer_by_layer(reports: dict[str, Path], browser: Browser) -> None:
    """The heat map has the norms of the adapter, and the ledger's."""
    opened = Opened(browser, reports["boost"] / REPORT, "desktop")
    drawn = opened.page.evaluate("document.getElementById('layers-0').data[0].z")
    ledger = json.loads((reports["boost"] / "adapter" / "ledger.json").read_text(encoding="utf-8"))
    for number, booster in enumerate(ledger["boosters"]):
        squared = sum(line[number] ** 2 for line in drawn)
        assert squared**0.5 == pytest.approx(booster["norm"], rel=1e-3)
    assert len(drawn[0]) == len(ledger["boosters"]) + 1
    opened.page.close()


def test_boosters_that_were_not_judged_leave_a_gap(reports: dict[str, Path]) -> None:
    """Evaluations need not come at each merge: a point stands over the number of boosters that it was."""
    run = read_view(next(reports["comparison"].glob("xgblora_*")))
    assert [line["boosters"] for line in run.curves.evals] == [1, 2, 2]
    gap = replace(run, curves=replace(run.curves, evals=run.curves.evals[1:]))
    loss, accuracy = booster_charts([gap])
    assert [trace["x"] for trace in (*loss.traces, *accuracy.traces)] == [[0, 2, 3], [0, 2, 3]]
    assert "The run kept" not in loss.says
    kept = replace(run, curves=replace(run.curves, result=replace(run.result, boosters=2)))
    assert booster_charts([kept])[0].says.endswith("The run kept 2 of 3.")


def test_a_report_is_made_again_without_the_model(reports: dict[str, Path], run: Run, tmp_path: Path) -> None:
    code, out, err = run("report", reports["comparison"], "--output", tmp_path / "again.html")
    assert (code, err) == (0, "")
    assert out.strip() == str(tmp_path / "again.html")
    assert "LoRA+ZO" in (tmp_path / "again.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("metrics.json", "metrics.json is damaged"),
        ("answers.jsonl", "answers.jsonl, line 1 is damaged"),
        ("adapter/adapter_model.safetensors", "adapter_model.safetensors"),
    ],
)
def test_damaged_runs_are_refused_in_a_line(
    reports: dict[str, Path], run: Run, tmp_path: Path, damage: str, words: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reports["boost"], folder)
    (folder / REPORT).unlink()
    (folder / damage).write_bytes(b"{nothing\n")
    code, _, err = run("report", folder)
    assert code == 2
    assert err.count("\n") == 1
    assert words in err
    assert not (folder / REPORT).exists()


def test_no_run_no_report(run: Run, tmp_path: Path) -> None:
    assert run("report", tmp_path)[::2] == (2, f"error: {tmp_path} holds no finished run: "
                                               f"{tmp_path / 'metrics.json'} is missing\n")  # fmt: skip


def test_answers_are_those_of_the_evaluation(reports: dict[str, Path]) -> None:
    for kind in ("run", "boost", "text"):
        rows = read_answers(reports[kind] / "answers.jsonl")
        result = RunResult.read(reports[kind])
        assert len(rows) == result.rows["evaluation"]
        assert sum(row.trained.is_right for row in rows) / len(rows) == pytest.approx(result.accuracy)
        assert sum(row.base.is_right for row in rows) / len(rows) == pytest.approx(result.zero_shot_accuracy)
        won = sum(row.trained.is_right and not row.base.is_right for row in rows)
        assert won == result.rows_won
    assert rows[0].trained.probability is None  # written


def test_runs_of_an_earlier_version_have_a_report(reports: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reports["boost"], folder)
    for name in ("answers.jsonl", "environment.json"):
        (folder / name).unlink()
    view: RunView = read_view(folder)
    assert (list(view.answers), dict(view.environment)) == ([], {})
    assert main(["report", str(folder)]) == 0
    assert "kept no answers" in (folder / REPORT).read_text(encoding="utf-8")


def test_a_difference_is_clear_where_rows_and_seeds_agree() -> None:
    worse = {seed: [number % 2 == 0 for number in range(200)] for seed in range(3)}
    better = {seed: [number % 4 != 1 for number in range(200)] for seed in range(3)}
    clear = paired_difference(worse, better)
    assert clear is not None
    assert clear.mean == pytest.approx(0.25)
    assert clear.low > 0.15
    assert clear.high < 0.35
    assert clear.is_clear
    other = {0: better[0], 1: worse[1], 2: [not hit for hit in better[2]]}
    torn = paired_difference(worse, other)
    assert torn is not None
    assert not torn.is_clear
    assert paired_difference(worse, {7: better[0]}) is None


def test_one_seed_has_the_interval_of_its_rows() -> None:
    """Within a tenth of the normal approximation's."""
    first = {0: [False] * 400}
    second = {0: [number % 4 == 0 for number in range(400)]}
    made = paired_difference(first, second)
    assert made is not None
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert made.high - made.low == pytest.approx(2 * half, rel=0.1)


def _row(before: float, after: float, right: str = "yes") -> AnsweredRow:
    def answer(of_right: float) -> Answer:
        other = {"yes": "no", "no": "yes"}[right]
        hit = of_right >= 0.5
        return Answer(right if hit else other, hit, max(of_right, 1 - of_right), of_right)

    return AnsweredRow("asked", (right,), answer(before), answer(after))


def test_what_changed_most_comes_first_up_or_down() -> None:
    rows = [_row(0.5, 0.6), _row(0.9, 0.1), _row(0.2, 0.9), _row(0.4, 0.4)]
    assert [round(row.change, 1) for row in changed_most(rows, 2)] == [-0.8, 0.7]
    assert len(changed_most(rows, 9)) == 3


def test_calibration_and_confusion_are_counted() -> None:
    rows = [_row(0.5, 0.95), _row(0.5, 0.95), _row(0.5, 0.05), _row(0.5, 0.65, "no")]
    bins = calibration([row.trained for row in rows])
    assert [(one.rows, round(one.right, 3)) for one in bins] == [(1, 1.0), (3, 0.667)]
    assert calibration_error([Bin(1.0, 0.5, 1), Bin(0.5, 0.5, 3)]) == pytest.approx(0.125)
    assert confusion(rows) == (["no", "yes"], [[1, 0], [1, 2]])


def test_long_curves_are_thinned_and_smoothed(reports: dict[str, Path]) -> None:
    run = read_view(reports["run"])
    values = [1 / step for step in range(1, 30_001)]
    line = over_work(run, list(range(1, 30_001)), values)
    assert len(line.y) < 1100
    assert line.y[0] == 1.0
    assert line.x["steps"][-1] == 30_000
    mean = smoothed(run, list(range(1, 101)), [2.0] * 50 + [4.0] * 50)
    assert mean.x["steps"][0] == 5
    assert (mean.y[0], mean.y[-1]) == (2.0, 4.0)
    assert any(2 < value < 4 for value in mean.y)
