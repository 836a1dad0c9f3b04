"""--boost_keep: other text, that boosters change as little as they can."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from architectures import tiny
from conftest import ARCHITECTURES, build, byte_tokenizer, examples, refusal_by_command, train_by_command
from xgblora import Base, Example, OptionLoss, RunConfig, TextLoss, Trainer, XgbloraError, attach
from xgblora.adapters.adapters import Adapters
from xgblora.adapters.boosters import Ledger
from xgblora.cli import main
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.boost import boost
from xgblora.learn.fitted.kept import look_beside
from xgblora.learn.forgetting import OWN_TEXTS, OWN_WORDS, own_texts
from xgblora.learn.losses import AnswerLoss

SIZES = "--num_train 64 --num_dev 8 --num_eval 12"


def texts(count: int, seed: int, length: int = 8) -> list[Example]:
    """Texts of words that no prompt has. All are predicted but the first."""
    words = torch.randint(2, 10, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example(row[:-1], [row[-1:]], 0, score_prompt=True) for row in words]


def of_text(layers: list[str]) -> Adapters:
    return attach(build(ARCHITECTURES["llama"]), 2, 16, layers, xgblora=True)


def words(adapters: Adapters, rows: list[Example]) -> Tensor:
    """Log-probabilities of every word that follows a text's, (texts, length - 1, vocabulary)."""
    with torch.no_grad():
        return adapters.model(input_ids=torch.tensor([row.prompt for row in rows])).logits.log_softmax(-1)


def divergence(before: Tensor, after: Tensor) -> float:
    """Mean Kullback-Leibler divergence of a word, in nats."""
    return (before.exp() * (before - after)).sum(-1).mean().item()


def test_what_a_change_costs_is_the_divergence_to_second_order() -> None:
    """Of a text's words, in the mean, once for every example that is fitted; seen with steps of many sizes."""
    forwards = Forwards(of_text(["o_proj"]), TextLoss())
    learned, kept = examples(12), texts(6, 1)
    with torch.no_grad():
        (seen,) = forwards.observe(learned)
        beside = look_beside(forwards, kept, seen)
        hidden = beside.seen.hidden
        draw = torch.Generator().manual_seed(0)
        outputs = torch.linalg.qr(torch.randn(32, 2, generator=draw))[0].T.contiguous()
        moved = 0.02 * hidden.norm(dim=1).mean() * torch.randn(len(hidden), 2, generator=draw)
        costs = []
        for _ in range(200):  # each draws four words at every position
            change, bend = beside.cost(outputs, torch.tensor(1.0), draw)
            costs.append(0.5 * (moved * bend.curved(moved)).sum().item())
        before, after = (
            forwards.base.logits(forwards.tail(h)).log_softmax(-1) for h in (hidden, hidden + moved @ outputs)
        )
    assert len(change.coordinates) == len(hidden) == 6 * 7
    assert torch.tensor(costs).mean().item() == pytest.approx(12 * divergence(before, after), rel=0.05)


@pytest.mark.parametrize("layers", [["o_proj"], ["o_proj", "down_proj"]], ids=["fitted", "some turned down"])
@pytest.mark.parametrize("loss", [OptionLoss(), TextLoss()], ids=["options", "text"])
def test_a_booster_is_kept_off_other_text(layers: list[str], loss: AnswerLoss) -> None:
    """The same rows are learned with less of a change of texts that the fit has not seen."""
    changed, lowered = {}, {}
    for name, kept in (("free", []), ("kept", texts(300, 1))):
        adapters, other = of_text(layers), texts(40, 2)
        forwards = Forwards(adapters, loss)
        forwards.kept, forwards.keep_weight = kept, 10.0
        before = words(adapters, other)
        booster = boost(forwards, examples(80), examples(40, seed=9))
        changed[name] = divergence(before, words(adapters, other))
        lowered[name] = booster.before - booster.after
        assert booster.cost.sequences == 80 + 300 * bool(kept) + 40 * (booster.cost.passes - 1 - bool(kept))
    assert changed["kept"] < 0.5 * changed["free"]
    assert lowered["kept"] > 0.5 * lowered["free"] > 0


def test_each_booster_looks_at_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgblora.learn.fitted.kept.MOST_POSITIONS", 20)
    adapters = of_text(["o_proj"])
    forwards = Forwards(adapters, TextLoss())
    shown = []
    for _ in range(2):
        with torch.no_grad():
            (seen,) = forwards.observe(examples(8))
            shown.append([tuple(row.prompt) for row in look_beside(forwards, texts(50, 1), seen).seen.examples])
        Ledger(adapters).merge(1, "", None)
    assert [len(rows) for rows in shown] == [2, 2]  # 7 predicted words each
    assert set(shown[0]).isdisjoint(shown[1])


def test_only_the_recipe_keeps_off_text(tmp_path: Path) -> None:
    model = build(ARCHITECTURES["llama"])
    config = RunConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    trainer = Trainer(model, config, attach(model), examples(8))
    with pytest.raises(XgbloraError, match="only --recipe boost can keep off other text"):
        trainer.method.keep(texts(2, 0))


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_model_writes_texts_by_itself(name: str) -> None:
    """As many as asked for, each ended by the end of a text or by its length; the same ones for the same seed."""
    base, tokenizer = Base.of(build(ARCHITECTURES[name])), byte_tokenizer()
    rows, again, others = (own_texts(base, tokenizer, seed) for seed in (0, 0, 1))
    assert rows == again != others
    assert len(rows) == OWN_TEXTS
    for row in rows:
        words = [*row.prompt, *row.options[0]]
        assert row.score_prompt
        assert row.prompt[0] not in tokenizer.all_special_ids
        assert len(words) == min(OWN_WORDS + 1, base.context_length or 0) or words[-1] == base.model.config.eos_token_id
    firsts = {row.prompt[0] for row in rows}
    assert len(firsts) > OWN_TEXTS // 4


def test_random_numbers_of_others_stay_what_they_were() -> None:
    base, draws = Base.of(build(ARCHITECTURES["llama"])), []
    for write in (True, False):
        torch.manual_seed(3)
        if write:
            own_texts(base, byte_tokenizer(), 0)
        draws.append(torch.rand(3))
    assert draws[0].equal(draws[1])


@pytest.mark.parametrize(
    ("flags", "keeps"),
    [
        ("--recipe boost --train_as_classification false", "own"),
        ("--recipe boost --train_as_classification false --boost_keep none", "none"),
        ("--recipe boost", "none"),
        ("--recipe boost --boost_keep own", "own"),
        ("--max_steps 2 --train_as_classification false", "none"),
    ],
)
def test_boosters_of_text_are_kept_off_what_the_model_writes(
    flags: str, keeps: str, tmp_path: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record says what it came to; the same command finds the run complete."""
    flags += f" --task_name SST2 --data_dir {data_folder} {SIZES}"
    metrics = train_by_command(tmp_path, model_folder, flags)
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["boost_keep"] == keeps
    assert ("Text to change little: own" in capsys.readouterr().out) is (keeps == "own")
    assert train_by_command(tmp_path, model_folder, flags) == metrics
    assert "is complete" in capsys.readouterr().out


def test_a_model_that_cannot_write_is_kept_off_nothing(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line says so; it is an error where it was asked to write."""
    tiny("xlstm").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    flags = f"--recipe boost --train_as_classification false --task_name SST2 --data_dir {data_folder} {SIZES}"
    line = refusal_by_command(tmp_path, tmp_path / "model", f"{flags} --boost_keep own", capsys)
    assert "--boost_keep own: xLSTMForCausalLM cannot write text by itself" in line
    assert not (tmp_path / "run").exists()
    train_by_command(tmp_path, tmp_path / "model", flags)
    assert "xLSTMForCausalLM cannot write text by itself" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["boost_keep"] == "none"


def test_the_file_is_used_alone_and_in_a_comparison(
    tmp_path: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a comparison, too, whose first method has no use for it; a changed file is another run."""
    file = tmp_path / "keep.txt"
    file.write_text("It rained all day, and the river rose.\nNo one was hurt.\n", encoding="utf-8")
    common = f"--task_name SST2 --data_dir {data_folder} {SIZES} --prompt_beginning auto"
    flags = f"{common} --recipe boost --boost_keep {file}"
    free = train_by_command(tmp_path, model_folder, f"{common} --recipe boost")
    (tmp_path / "run").rename(tmp_path / "free")
    kept = train_by_command(tmp_path, model_folder, flags)
    assert kept["eval_loss"] != free["eval_loss"]
    command = f"compare --model_name {model_folder} --use_cpu true --disable_tqdm true --output_root {tmp_path / 'all'}"
    command += f" {common} --boost_keep {file} --seeds 42 --max_steps 2 --methods lora boost"
    assert main(command.split()) == 0
    metrics = json.loads((tmp_path / "all" / "boost_seed42" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["eval_loss"] == kept["eval_loss"]
    file.write_text("Ships lay in the bay: five of them.\n", encoding="utf-8")
    assert "--boost_keep has changed" in refusal_by_command(tmp_path, model_folder, flags, capsys)
    assert main([*command.split(), "--skip_completed"]) != 0
    assert "--boost_keep has changed" in capsys.readouterr().err
