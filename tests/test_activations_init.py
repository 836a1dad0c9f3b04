"""Pairs drawn from activations, whose length zeroth-order steps find (--xgblora_init activations)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ARCHITECTURES, LogLines, Run, build, examples, refusal_by_command, train, train_by_command
from xgblora import Example, RunConfig, Trainer, attach
from xgblora.config import better
from xgblora.errors import XgbloraError
from xgblora.learn.drawn import DrawnMethod
from xgblora.learn.fitted.step_length import NewtonLength

WRITERS: dict[str, Any] = {"lora_target_modules": ["o_proj", "down_proj"]}
DRAWN: dict[str, Any] = WRITERS | {"xgblora_init": "activations", "xgblora_init_examples": 24}
BOOSTED: dict[str, Any] = DRAWN | {"xgblora": True, "xgblora_steps_per_iteration": 6}


def drawn(folder: Path, rows: list[Example] | None = None, **flags: Any) -> tuple[Trainer, list[float]]:
    return train(folder, build(ARCHITECTURES["llama"]), rows, **(DRAWN | flags))


def test_without_a_merge_xgblora_is_rank_1_lora_to_the_last_bit(tmp_path: Path) -> None:
    lora, of_lora = drawn(tmp_path / "lora", lora=True, lora_r=1)
    boosted, of_boosted = drawn(tmp_path / "xgblora", xgblora=True, xgblora_merge_frequency=0)
    assert of_lora == of_boosted
    assert lora.cost == boosted.cost
    for mine, theirs in zip(lora.adapters.layers.values(), boosted.adapters.layers.values(), strict=True):
        assert torch.equal(mine.lora_A, theirs.lora_A)
        assert torch.equal(mine.lora_B, theirs.lora_B)


def test_it_learns_in_a_few_steps_and_merges_go_on(tmp_path: Path) -> None:
    """The first token tells the label; random pairs take 600 steps for it."""
    held_out = examples(100, seed=2)
    losses = {}
    for name, flags in (("lora", {"lora": True, "lora_r": 1}), ("xgblora", BOOSTED)):
        trainer, _ = drawn(tmp_path / name, examples(200), max_steps=60, per_device_train_batch_size=16, **flags)
        losses[name] = trainer.evaluate(held_out)["eval_loss"]
    trainer.ledger.truncate(0)
    before = trainer.evaluate(held_out)["eval_loss"]
    assert losses["lora"] < 0.95 * before
    assert losses["xgblora"] < 0.6 * before
    assert losses["xgblora"] < 0.7 * losses["lora"]


@pytest.mark.parametrize("checkpoint", [4, 12, 22])
def test_a_resumed_run_is_the_run_that_never_stopped(checkpoint: int, tmp_path: Path) -> None:
    """Within a pair, right after a merge, and later: the pair is drawn again and counted once."""
    flags = BOOSTED | {"max_steps": 30, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 99}
    whole, losses = drawn(tmp_path / "whole", **flags)
    resumed, tail = drawn(tmp_path / "resumed", **flags, resume=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
    assert tail == losses
    assert resumed.ledger.boosters == whole.ledger.boosters
    assert resumed.cost == whole.cost
    assert resumed.method.state() == whole.method.state()
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        for matrix in ("lora_A", "lora_B", "booster_A", "booster_B"):
            assert torch.equal(getattr(mine, matrix), getattr(theirs, matrix)), matrix


def test_no_rate_and_no_probe_decides_anything(tmp_path: Path) -> None:
    curves = []
    for number, flags in enumerate(({"learning_rate": 1e-5, "zo_eps": 1e-3}, {"learning_rate": 1.0, "optim": "sgd"})):
        _, losses = drawn(tmp_path / str(number), **(BOOSTED | flags))
        curves.append(losses)
    assert curves[0] == curves[1]
    assert len(set(curves[0])) > 10


def test_every_example_is_counted(tmp_path: Path) -> None:
    """18 steps of 8 examples at three places, and 24 examples for each of three pairs."""
    trainer, _ = drawn(tmp_path, max_steps=18, **BOOSTED)
    assert len(trainer.ledger.boosters) == 2
    assert trainer.cost.sequences == 18 * 3 * 8 + 3 * 24
    assert trainer.cost.passes == 18 * 3 + 3


def test_steps_see_no_row_that_a_pair_is_fitted_to(tmp_path: Path) -> None:
    rows = examples(48)
    trainer, _ = drawn(tmp_path, rows, **BOOSTED)
    method = trainer.method
    assert isinstance(method, DrawnMethod)
    fitted, stepped = {id(row) for row in method.fitted}, {id(row) for row in trainer.train_dataset}
    assert (len(fitted), len(stepped)) == (36, 12)
    assert fitted | stepped == {id(row) for row in rows}


def test_pairs_are_fitted_to_rows_in_turn(tmp_path: Path) -> None:
    flags = BOOSTED | {"xgblora_init_examples": 20}
    trainer, _ = drawn(tmp_path, examples(64), **flags)  # 48 rows to fit to
    method = trainer.method
    assert isinstance(method, DrawnMethod)
    rows = [id(row) for number in range(12) for row in method.rows_of(number)]
    assert len(set(rows[:48])) == 48
    assert sorted(rows[:48]) == sorted(rows[48:96])
    assert rows[:48] != rows[48:96]


@pytest.mark.parametrize(("options", "rank", "used"), [(2, 4, 1), (4, 4, 3), (4, 2, 2), (4, 1, 1)])
def test_as_many_ranks_are_used_as_options_have_directions(options: int, rank: int, used: int, tmp_path: Path) -> None:
    rows = examples(64, [[40 + number] for number in range(options)])
    trainer, _ = drawn(tmp_path, rows, lora=True, lora_r=rank, max_steps=4)
    B = torch.cat([layer.lora_B for layer in trainer.adapters.layers.values()])
    assert B.any(0).tolist() == [number < used for number in range(rank)]


@pytest.mark.parametrize(("options", "asked", "used"), [(2, 4, 1), (4, 8, 3), (4, 2, 2), (4, 1, 1)])
def test_boosters_have_as_many_directions_as_options_need(
    options: int, asked: int, used: int, tmp_path: Path, log_lines: LogLines
) -> None:
    rows = examples(64, [[40 + number] for number in range(options)])
    trainer, _ = drawn(tmp_path, rows, max_steps=8, xgblora_init_directions=asked, **BOOSTED)
    assert trainer.adapters.ranks == [used]
    assert trainer.adapters.rank == used
    assert trainer.adapters.total_rank == 2 * used
    assert len(log_lines.containing("came further in fewer steps")) == (used < options - 1)


def test_without_a_merge_boosters_of_several_directions_are_lora_to_the_last_bit(tmp_path: Path) -> None:
    rows = examples(64, [[40 + number] for number in range(4)])
    lora, of_lora = drawn(tmp_path / "lora", rows, lora=True, lora_r=3, lora_alpha=48)  # alpha / r as of rank 1
    boosted, of_boosted = drawn(
        tmp_path / "xgblora", rows, xgblora=True, xgblora_merge_frequency=0, xgblora_init_directions=3
    )
    assert of_lora == of_boosted
    for mine, theirs in zip(lora.adapters.layers.values(), boosted.adapters.layers.values(), strict=True):
        assert torch.equal(mine.lora_A, theirs.lora_A)
        assert torch.equal(mine.lora_B, theirs.lora_B)


def test_boosters_along_several_directions_learn_more_options(tmp_path: Path) -> None:
    """Four options need three directions; with one at a time, two boosters leave one of them out."""
    options = [[40 + number] for number in range(4)]
    losses = []
    for directions in (1, 3):
        flags = BOOSTED | {"xgblora_init_directions": directions, "max_steps": 12, "per_device_train_batch_size": 16}
        trainer, _ = drawn(tmp_path / str(directions), examples(240, options), **flags)
        losses.append(trainer.evaluate(examples(100, options, seed=2))["eval_loss"])
    assert losses[1] < 0.9 * losses[0]


def test_a_resumed_run_of_several_directions_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    flags = BOOSTED | {"xgblora_init_directions": 3, "max_steps": 20}
    flags |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 99}
    rows = examples(64, [[40 + number] for number in range(4)])
    whole, losses = drawn(tmp_path / "whole", rows, **flags)
    resumed, tail = drawn(tmp_path / "resumed", rows, **flags, resume=str(tmp_path / "whole" / "checkpoint-16"))
    assert tail == losses
    assert resumed.adapters.ranks == whole.adapters.ranks == [3, 3, 3]
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        for matrix in ("lora_A", "lora_B", "booster_A", "booster_B"):
            assert torch.equal(getattr(mine, matrix), getattr(theirs, matrix)), matrix


def test_a_text_loss_is_learned(tmp_path: Path) -> None:
    """A dozen words as answers, each told by the prompt's first token, as a language model says them."""
    rows = [
        Example([10 + number % 12, *[30 + (number * k) % 17 for k in range(1, 4)]], [[50 + number % 12, 2]], label=0)
        for number in range(160)
    ]
    flags = BOOSTED | {"train_as_classification": False, "lora_target_modules": ["down_proj"]}
    trainer, _ = drawn(tmp_path, rows, max_steps=36, per_device_train_batch_size=16, **flags)
    after = trainer.evaluate(rows[:60])["eval_loss"]
    trainer.ledger.truncate(0)
    assert after < 0.8 * trainer.evaluate(rows[:60])["eval_loss"]


def test_what_cannot_be_fitted_is_refused_before_training(tmp_path: Path) -> None:
    def attempt(message: str, objective: Any = None, targets: Any = ("o_proj",), count: int = 20) -> None:
        model = build(ARCHITECTURES["llama"])
        config = RunConfig(output_dir=str(tmp_path), xgblora_init="activations", lora_r=1, use_cpu=True)
        with pytest.raises(XgbloraError, match=message):
            Trainer(model, config, attach(model, 1, target_modules=list(targets)), examples(count), objective=objective)

    attempt("no reward and no other objective", objective=lambda model, batch: torch.ones(batch.segments))
    attempt("q_proj does not", targets=["q_proj"])
    attempt("needs 3 at least, got 2", count=2)
    with pytest.raises(XgbloraError, match="follows labels: leave out"):
        RunConfig(output_dir=str(tmp_path), xgblora_init="activations", reward="accuracy", use_cpu=True)
    with pytest.raises(XgbloraError, match="gradient_accumulation_steps sums gradients"):
        RunConfig(output_dir=str(tmp_path), xgblora_init="activations", gradient_accumulation_steps=2, use_cpu=True)


TASK = """
data: {train: rows.jsonl, test: rows.jsonl}
prompt: "{{ text }} It was"
options: [" great", " terrible"]
answer: label
"""


def test_by_command_it_adapts_what_recipe_boost_does(tmp_path: Path, model_folder: Path) -> None:
    """The upper half of the layers that write to the residual stream, and prompts that begin alike."""
    texts = ("a warm and funny film", "a dull and lifeless mess")
    rows = [{"text": f"{texts[number % 2]} {number}", "label": number % 2} for number in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = "--xgblora --xgblora_init activations --xgblora_init_examples 16 --xgblora_steps_per_iteration 4 "
    flags += "--max_steps 12 --num_train 60 --num_dev 10 --num_eval 30"
    metrics = train_by_command(tmp_path, model_folder, flags, TASK)
    assert metrics["eval_loss"] < 0.8 * metrics["zero_shot_loss"]
    assert metrics["boosters"] == 3
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(adapter["target_modules"]) == {"out_proj", "fc2"}
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["prompt_beginning"] == "auto"


def test_a_dry_run_counts_the_rows_that_steps_see(small: list[str], run: Run, tmp_path: Path) -> None:
    """Of 40 rows steps see 10: two batches of 8 an epoch, and a merge after each epoch but the last."""
    flags = f"--xgblora --xgblora_init activations --num_train_epochs 3 --output_dir {tmp_path / 'run'}".split()
    _, planned, _ = run("train", *small, *flags, "--dry_run")
    code, _, err = run("train", *small, *flags)
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["steps"], metrics["merges"]) == (6, 2)
    assert "6 steps, 2 merges" in planned


def test_rewards_are_refused_by_command(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal_by_command(tmp_path, model_folder, "--xgblora_init activations --reward accuracy", capsys)
    assert "--xgblora_init activations follows labels" in line
    assert not (tmp_path / "run").exists()


def test_a_training_from_random_pairs_says_what_does_better() -> None:
    for flags in ({}, {"xgblora": True}):
        assert "--xgblora_init activations came to" in str(better(RunConfig(use_cpu=True, **flags)))
    others = {"recipe": "boost"}, {"trainer": "regular"}, {"trainer": "none"}, {"reward": "accuracy"}
    for other in (*others, {"xgblora_init": "activations"}):
        assert better(RunConfig(use_cpu=True, **other)) is None


def _noisy(lowest: float, bend: float, noise: float, batches: int, seed: int) -> NewtonLength:
    """A length found on a quadratic, from batches of 16 examples with noise of their own."""
    draw, length = torch.Generator().manual_seed(seed), NewtonLength()
    for _ in range(batches):
        slopes: Tensor = bend * (length.taken - lowest) + noise * torch.randn(16, generator=draw)
        length.observe(slopes, bend + 0.3 * bend * torch.randn((), generator=draw).item())
    return length


def test_a_length_is_that_of_all_batches_together() -> None:
    """Within the standard error of a mean over all examples, which is what is taken off it."""
    error = 3.0 / 2.0 / 320**0.5
    far = [_noisy(1.5, 2.0, 3.0, 20, seed).length - 1.5 for seed in range(50)]
    assert (sum(x * x for x in far) / 50) ** 0.5 < 1.3 * error
    taken = [_noisy(1.5, 2.0, 3.0, 20, seed) for seed in range(50)]
    assert all(0.7 * error < length.length - length.taken < 1.4 * error for length in taken)


def test_a_length_that_may_be_chance_is_mostly_none() -> None:
    none = [_noisy(0.0, 2.0, 3.0, 6, seed).taken for seed in range(100)]
    assert sum(taken == 0 for taken in none) > 55
    assert sum(abs(taken) for taken in none) / 100 < 0.1


def test_where_the_loss_bends_the_other_way_a_step_is_bounded() -> None:
    length = NewtonLength()
    length.observe(torch.full((4,), -100.0), bend=-1.0)
    assert length.taken == 1.0
    length = NewtonLength()
    length.observe(torch.full((4,), -100.0), bend=1e-6)
    assert length.taken == 1.0
