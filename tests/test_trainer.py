"""Training: equivalence of the methods without a merge, merges where the schedule says, exact resume, loud failure."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from conftest import ARCHITECTURES, LogLines, build, examples, train
from xgblora import DivergedError, LayerSubset, OptionLoss, RunConfig, Trainer, XgbloraError, attach
from xgblora.files import verify
from xgblora.learn.estimators import Key, TwoSided
from xgblora.training.record import CurveRecorder


@pytest.mark.parametrize("trainer", [pytest.param("zo", marks=pytest.mark.soak), "regular"])
def test_xgblora_without_a_merge_is_rank_1_lora_to_the_last_bit(
    trainer: str, tmp_path: Path, log_lines: LogLines
) -> None:
    """The reason this project exists; by zeroth-order steps test_cli.py shows it, too, over 2000 of them."""
    flags: dict[str, Any] = {"trainer": trainer, "max_steps": 60, "lora_alpha": 16, "seed": 3}
    _, lora = train(tmp_path / "a", **flags, lora=True, lora_r=1)
    _, xgblora = train(tmp_path / "b", **flags, xgblora=True, xgblora_steps_per_iteration=60)
    assert len(lora) == 60
    assert lora == xgblora
    assert lora[0] != lora[-1]
    assert log_lines.containing("Merging") == []
    assert log_lines.containing("expected merges: 0")


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_the_equivalence_test_can_fail(trainer: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"trainer": trainer, "max_steps": 10}
    _, lora = train(tmp_path / "a", **flags, lora=True, lora_r=1)
    _, other_alpha = train(tmp_path / "b", **flags, xgblora=True, xgblora_merge_frequency=0, lora_alpha=8)
    _, merged = train(tmp_path / "c", **flags, xgblora=True, xgblora_steps_per_iteration=6)
    assert lora != other_alpha
    assert lora[:6] == merged[:6]
    assert lora[6:] != merged[6:]


@pytest.mark.parametrize("every", [10, pytest.param(100, marks=pytest.mark.soak)])
def test_merges_after_every_100_of_350_steps(every: int, tmp_path: Path, log_lines: LogLines) -> None:
    """And after every 10 of 35."""
    trainer, _ = train(tmp_path, max_steps=7 * every // 2, xgblora=True, xgblora_steps_per_iteration=every)
    assert log_lines.containing("Merging") == [
        f"XGBLoRA: Merging and reinitializing at step {step}" for step in (every, 2 * every, 3 * every)
    ]
    assert log_lines.containing("expected merges: 3")
    assert trainer.adapters.boosters == 3


@pytest.mark.parametrize("trainer", [pytest.param("zo", marks=pytest.mark.soak), "regular"])
def test_merges_every_second_of_7_epochs(trainer: str, tmp_path: Path, log_lines: LogLines) -> None:
    train(
        *(tmp_path, None, examples(20)),
        max_steps=-1,
        num_train_epochs=7,
        xgblora=True,
        xgblora_merge_frequency=2,
        trainer=trainer,
    )
    assert log_lines.containing("Merging") == [
        f"XGBLoRA: Merging and reinitializing at epoch {epoch}" for epoch in (2, 4, 6)
    ]


def test_given_both_schedules_only_steps_merge(tmp_path: Path, log_lines: LogLines) -> None:
    train(
        *(tmp_path, None, examples(20)),
        max_steps=21,
        xgblora=True,
        xgblora_merge_frequency=1,
        xgblora_steps_per_iteration=10,
    )
    assert log_lines.containing("Merging") == [
        "XGBLoRA: Merging and reinitializing at step 10",
        "XGBLoRA: Merging and reinitializing at step 20",
    ]


def test_adaptive_merges_follow_the_losses(tmp_path: Path, log_lines: LogLines) -> None:
    """An objective that never improves, whatever the parameters: patience runs out again and again."""

    def flat(model: Any, batch: Any) -> Tensor:
        return OptionLoss()(model, batch) * 0 + 1

    config = RunConfig(
        output_dir=str(tmp_path),
        max_steps=20,
        xgblora=True,
        xgblora_use_adaptive_merge=True,
        xgblora_patience=4,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = build(ARCHITECTURES["opt"])
    Trainer(model, config, attach(model, xgblora=True), examples(40), objective=flat).train()
    assert [line[-2:].strip() for line in log_lines.containing("Merging")] == ["5", "10", "15"]


def test_an_adaptive_merge_goes_back_to_the_best_pair(tmp_path: Path) -> None:
    """Losses by order, gradients by hand: B falls by 1 a step, and the third loss is the lowest."""
    losses = iter([5.0, 4.0, 3.0, 9.0, 9.0, 8.0])

    def staged(model: Any, batch: Any) -> Tensor:
        total = sum(layer.lora_B.sum() for layer in trainer.adapters.layers.values())
        return (total - total.detach() + next(losses)) * torch.ones(batch.segments)

    flags: dict[str, Any] = {"trainer": "regular", "xgblora_use_adaptive_merge": True, "xgblora_patience": 2}
    flags |= {"xgblora_ema_beta": 0.0, "learning_rate": 1.0, "optim": "sgd", "max_steps": 6, "save_strategy": "no"}
    config = RunConfig(output_dir=str(tmp_path), xgblora=True, disable_tqdm=True, use_cpu=True, **flags)
    model = build(ARCHITECTURES["opt"])
    trainer = Trainer(model, config, attach(model, xgblora=True), examples(64), objective=staged)
    trainer.train()
    assert [(booster.step, booster.reason) for booster in trainer.ledger.boosters] == [
        (5, "no improvement for 2 steps")
    ]
    for layer in trainer.adapters.layers.values():
        assert torch.equal(layer.booster_B, torch.full_like(layer.booster_B, -2.0))  # as it was when the loss was 3


def test_the_best_pair_survives_a_resume(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"xgblora": True, "xgblora_use_adaptive_merge": True, "xgblora_patience": 3}
    flags |= {
        "xgblora_ema_beta": 0.0,
        "max_steps": 30,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 99,
    }
    whole, _ = train(tmp_path / "whole", **flags)
    merge = whole.ledger.boosters[0].step
    between = tmp_path / "whole" / f"checkpoint-{merge - 2}"
    assert (between / "best_pair.safetensors").is_file()
    resumed, _ = train(tmp_path / "resumed", **flags, resume=str(between))
    assert resumed.ledger.boosters == whole.ledger.boosters
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        assert torch.equal(mine.booster_B, theirs.booster_B)


def test_boosters_know_where_they_come_from(tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "xgblora": True,
        "xgblora_steps_per_iteration": 4,
        "max_steps": 10,
        "eval_strategy": "steps",
    }
    trainer, _ = train(tmp_path, **flags, eval_steps=100)
    for booster, step in zip(trainer.ledger.boosters, (4, 8), strict=True):
        assert (booster.step, booster.schedule, booster.reason) == (step, "every 4 steps", "every 4 steps")
        assert booster.evaluation is not None
        assert booster.norms.keys() == trainer.adapters.layers.keys()
        assert booster.norm == pytest.approx(sum(norm**2 for norm in booster.norms.values()) ** 0.5)
    assert len(trainer.ledger.evaluations()) >= 2


@pytest.mark.parametrize("recipe", ["classic", "boost"])
def test_shrinkage_makes_every_booster_smaller(recipe: str, tmp_path: Path) -> None:
    """The first booster sees the same model either way, so it is half as large; so is the last, which none follows."""
    flags: dict[str, Any] = {"xgblora": True, "xgblora_steps_per_iteration": 5, "max_steps": 5}
    if recipe == "boost":
        flags = {"recipe": "boost", "boost_boosters": 1, "boost_examples": 64, "lora_target_modules": ["out_proj"]}
    whole, _ = train(tmp_path / "whole", **flags)
    half, _ = train(tmp_path / "half", **flags, xgblora_shrinkage=0.5)
    for one, other in zip(whole.adapters.layers.values(), half.adapters.layers.values(), strict=True):
        assert one.lora_B.any()
        torch.testing.assert_close(one.lora_B / 2, other.lora_B)


def test_early_stopping_keeps_the_best_boosters(tmp_path: Path, log_lines: LogLines) -> None:
    """Steps far too long: after some booster it only gets worse, and the run goes back to the best."""
    flags: dict[str, Any] = {"xgblora": True, "xgblora_steps_per_iteration": 3, "max_steps": 60, "learning_rate": 0.3}
    trainer, _ = train(tmp_path, **flags, early_stopping_boosters=2)
    assert log_lines.containing("Stopping: 2 boosters")
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(losses) < 20
    best = losses.index(min(losses)) + 1
    assert best == len(losses) - 2
    assert len(trainer.ledger.boosters) + 1 == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_only_finished_boosters_stop_early(tmp_path: Path) -> None:
    """Evaluations between merges judge nothing: a new pair is no better than its predecessors for a while."""
    flags: dict[str, Any] = {"xgblora": True, "xgblora_steps_per_iteration": 3, "max_steps": 60, "learning_rate": 0.3}
    flags |= {"early_stopping_boosters": 2}
    alone, _ = train(tmp_path / "alone", **flags)
    often, _ = train(tmp_path / "often", **flags, eval_strategy="steps", eval_steps=1)
    assert often.state.global_step == alone.state.global_step < 60
    assert often.ledger.boosters == alone.ledger.boosters


def test_a_merge_resets_the_pairs_optimizer_state(tmp_path: Path) -> None:
    """After a merge Adam starts anew: its step count is that of the new pair alone."""
    trainer, _ = train(tmp_path, max_steps=8, xgblora=True, xgblora_steps_per_iteration=5)
    counts = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert counts == {3}


@pytest.mark.parametrize(
    ("packed", "trainer"),
    [
        (True, "regular"),
        (False, "zo"),
        pytest.param(True, "zo", marks=pytest.mark.soak),
        pytest.param(False, "regular", marks=pytest.mark.soak),
    ],
)
def test_training_learns(trainer: str, packed: bool, tmp_path: Path) -> None:
    """The first token tells the label, so the loss must fall far below log 2 on rows never trained on."""
    flags: dict[str, Any] = {"trainer": trainer, "max_steps": 200 if trainer == "zo" else 60, "learning_rate": 1e-2}
    flags |= {"lr_scheduler_type": "linear", "per_device_train_batch_size": 32, "packed": packed}
    held_out = examples(100, seed=2)
    trainer_, _ = train(tmp_path, build(ARCHITECTURES["llama"]), examples(200), **flags, lora=True, lora_r=1)
    after = trainer_.evaluate(held_out)
    trainer_.adapters.new_pair(0)  # B = 0: the bare model again
    before = trainer_.evaluate(held_out)
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accuracy"] > 0.85


STEPS: dict[str, Any] = {"xgblora_steps_per_iteration": 6}
PATIENCE: dict[str, Any] = {"xgblora_use_adaptive_merge": True}
QUICK = [("shared", "zo", PATIENCE), ("per_example", "regular", PATIENCE)]
"""The others are soak's; merges by steps are resumed in test_schedule.py, too, in drawn combinations."""


@pytest.mark.parametrize(
    ("directions", "trainer", "schedule"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.soak)
        for case in product(["per_example", "shared"], ["zo", "regular"], [STEPS, PATIENCE])
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(
    directions: str, trainer: str, schedule: dict[str, Any], tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"trainer": trainer, "zo_directions": directions, "xgblora": True, "xgblora_patience": 3}
    flags |= schedule | {"max_steps": 20, "save_strategy": "steps", "save_steps": 11, "save_total_limit": 9}
    flags |= {"lr_scheduler_type": "linear"}
    whole, losses = train(tmp_path / "whole", **flags)
    resumed, tail = train(tmp_path / "resumed", **flags, resume=str(tmp_path / "whole" / "checkpoint-11"))
    assert tail == losses  # the log history of the first 11 steps comes from the checkpoint
    assert resumed.ledger.boosters == whole.ledger.boosters
    assert resumed.cost == whole.cost
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        assert torch.equal(mine.lora_A, theirs.lora_A)
        assert torch.equal(mine.lora_B, theirs.lora_B)
        assert torch.equal(mine.booster_A, theirs.booster_A)


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    _, first = train(tmp_path / "a", seed=1, max_steps=4)
    torch.manual_seed(1234)
    _, same = train(tmp_path / "b", seed=1, max_steps=4)
    _, other = train(tmp_path / "c", seed=2, max_steps=4)
    assert first == same
    assert first != other


def test_gradient_accumulation_sees_the_examples_of_one_batch(tmp_path: Path) -> None:
    """Two micro-batches of 4 see the same examples as one batch of 8: by backpropagation the same losses."""
    flags: dict[str, Any] = {"trainer": "regular", "max_steps": 6, "optim": "sgd"}
    _, one = train(tmp_path / "a", per_device_train_batch_size=8, **flags)
    _, two = train(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2, **flags)
    assert one == pytest.approx(two, rel=1e-4)
    zo, _ = train(tmp_path / "c", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    assert zo.cost.passes == 3 * 2 * 2


def test_a_step_of_two_micro_batches_is_the_mean_of_two_estimates(tmp_path: Path) -> None:
    """Each along directions that its own place in the run draws."""
    rows, rate = examples(2) * 2, 1e-3
    flags: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    flags |= {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": rate, "seed": 3}
    trainer, _ = train(tmp_path, rows=rows, **flags)
    assert trainer.cost.passes == 2 * 2
    expected = attach(build(ARCHITECTURES["opt"]), rank=8, seed=3)
    estimates = [
        TwoSided(1e-2)(expected, OptionLoss(), expected.base.batch(rows[place : place + 2]), Key(3, 0, number))
        for number, place in enumerate((0, 2))
    ]
    assert not torch.equal(*(estimate.gradient for estimate in estimates))
    expected.accumulate_gradient(sum(estimate.gradient for estimate in estimates) / 2)
    for ours, theirs in zip(trainer.adapters.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - rate * theirs.grad)
        assert not torch.equal(ours, theirs)


def test_checkpoints_hold_adapters_only(tmp_path: Path) -> None:
    train(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    folder = tmp_path / "checkpoint-4"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert sum(f.stat().st_size for f in folder.iterdir()) < 200_000


def test_the_chosen_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Asked for the highest loss, which training leaves behind at once, it brings back the first checkpoint."""
    trainer, _ = train(
        tmp_path,
        max_steps=20,
        learning_rate=1e-2,
        trainer="regular",
        xgblora=True,
        xgblora_steps_per_iteration=7,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert max(losses) > losses[-1] + 0.05
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


def test_dropout_is_off_in_training(tmp_path: Path) -> None:
    """OPT has dropout 0.1: with it, two probes of one direction would see different noise."""
    assert ARCHITECTURES["opt"].dropout == 0.1
    trainer, _ = train(tmp_path, max_steps=2)
    assert not trainer.model.training


@pytest.mark.parametrize(
    ("trainer", "value"),
    [
        ("zo", float("inf")),
        ("regular", float("nan")),
        pytest.param("zo", float("nan"), marks=pytest.mark.soak),
        pytest.param("regular", float("inf"), marks=pytest.mark.soak),
    ],
)
def test_a_diverged_loss_stops_the_run_before_the_step(trainer: str, value: float, tmp_path: Path) -> None:
    config = RunConfig(
        output_dir=str(tmp_path),
        max_steps=20,
        trainer=trainer,
        save_strategy="steps",
        save_steps=3,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = build(ARCHITECTURES["opt"])
    calls = 0

    def spoiled(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        losses = OptionLoss()(model, batch)
        return losses * value if calls == 8 else losses

    adapters = attach(model)
    run = Trainer(model, config, adapters, examples(40), objective=spoiled)
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step 8, which was not applied"):
        run.train()
    assert all(torch.isfinite(p).all() for p in adapters.parameters())
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert run.state.global_step == 7


def test_an_own_objective_is_minimised(tmp_path: Path) -> None:
    """A library user's loss: here, make the first option likelier whatever the label."""

    def prefer_first(model: Any, batch: Any) -> Tensor:
        from dataclasses import replace

        return OptionLoss()(model, replace(batch, label=torch.zeros_like(batch.label)))

    config = RunConfig(
        output_dir=str(tmp_path),
        max_steps=60,
        trainer="regular",
        optim="adamw_torch",
        learning_rate=1e-2,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
    )
    model = build(ARCHITECTURES["opt"])
    trainer = Trainer(model, config, attach(model), examples(40), objective=prefer_first)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.1 * losses[0]


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), use_cpu=True)
    adapters = attach(build(ARCHITECTURES["opt"]))
    with pytest.raises(XgbloraError, match="belong to another model"):
        Trainer(build(ARCHITECTURES["opt"]), config, adapters, examples(4))


def test_boosted_adapters_must_have_rank_1(tmp_path: Path) -> None:
    model = build(ARCHITECTURES["opt"])
    config = RunConfig(output_dir=str(tmp_path), xgblora=True, use_cpu=True)
    with pytest.raises(XgbloraError, match="pairs of rank 1, the adapters have rank 2"):
        Trainer(model, config, attach(model, rank=2), examples(4))


def test_data_workers_do_not_change_the_run(tmp_path: Path) -> None:
    """Started as new processes, as on Windows: examples and collator must survive pickling."""
    _, plain = train(tmp_path / "a", max_steps=4)
    workers = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    _, spawned = train(tmp_path / "b", max_steps=4, **workers)
    assert plain == spawned


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_a_gradient_that_is_not_finite_stops_the_run(trainer: str, tmp_path: Path) -> None:
    """A finite loss may have an infinite slope: such a step would poison the adapters for good."""

    def steep(model: Any, batch: Any) -> Tensor:
        losses = OptionLoss()(model, batch)
        return (losses - losses.detach()).abs().sqrt() if trainer == "regular" else losses * 1e38

    config = RunConfig(output_dir=str(tmp_path), max_steps=3, trainer=trainer, disable_tqdm=True, use_cpu=True)
    model = build(ARCHITECTURES["opt"])
    adapters = attach(model)
    with pytest.raises(DivergedError, match=r"(the gradient is not finite|the loss is inf) at step 1"):
        Trainer(model, config, adapters, examples(8), objective=steep).train()
    assert all(torch.isfinite(p).all() for p in adapters.parameters())


def test_other_rows_are_scored_and_nothing_more(tmp_path: Path) -> None:
    """Rows for testing, evaluated at every merge: no line of the record, no booster kept, no stop depends on them."""
    flags: dict[str, Any] = {"xgblora": True, "xgblora_steps_per_iteration": 3, "max_steps": 60, "learning_rate": 0.3}
    flags |= {"early_stopping_boosters": 2, "eval_strategy": "steps", "eval_steps": 3}
    alone, _ = train(tmp_path / "alone", **flags)
    seen: list[dict[str, float]] = []

    class Curious(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 3 == 0:
                seen.append(trainer.evaluate(examples(16, seed=state.global_step), metric_key_prefix="test"))
                trainer.evaluate(examples(16, seed=100 + state.global_step))

    config = RunConfig(
        output_dir=str(tmp_path / "curious"),
        **{"optim": "adamw_torch", "zo_eps": 1e-2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True} | flags,
        disable_tqdm=True,
    )
    model = build(ARCHITECTURES["opt"])
    adapters = attach(model, seed=config.seed, xgblora=True)
    trainer = Trainer(model, config, adapters, examples(64), examples(32, seed=1), callbacks=[Curious()])
    recorder = CurveRecorder(tmp_path / "curious", trainer.ledger)
    trainer.add_callback(recorder)
    trainer.train()
    assert set(seen[0]) == {"test_loss", "test_accuracy"}
    assert trainer.state.global_step == alone.state.global_step < 60
    assert trainer.ledger.boosters == alone.ledger.boosters
    recorded = [json.loads(line) for line in (tmp_path / "curious" / "eval_loss.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in recorded] == list(range(3, trainer.state.global_step + 1, 3))
    kept = {booster.evaluation["eval_loss"] for booster in trainer.ledger.boosters if booster.evaluation}
    assert kept <= {line["eval_loss"] for line in recorded}


def test_going_back_to_the_best_does_not_undo_work(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    flags |= {"save_steps": 1, "metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 1e-2}
    trainer, _ = train(tmp_path, **flags, load_best_model_at_end=True)
    assert trainer.state.best_global_step < 9
    assert (trainer.cost.passes, trainer.cost.sequences) == (18, 9 * 2 * 8)
    trainer.save_adapters(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "ledger.json").read_text("utf-8"))["forward_passes"] == 18


@pytest.mark.parametrize(
    "flags", [{"recipe": "boost", "lora_target_modules": ["out_proj"]}, {}, {"trainer": "regular"}]
)
def test_a_steps_loss_lies_where_transformers_keeps_its_sum(flags: dict[str, Any], tmp_path: Path) -> None:
    """On a GPU a loss on the CPU is refused, after the whole first fit. No GPU here: another device stands for it."""

    class Elsewhere(RunConfig):
        device = property(lambda self: torch.device("meta" if self.elsewhere else "cpu"))
        elsewhere = False

    model = build(ARCHITECTURES["opt"])
    config = Elsewhere(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **flags)
    adapters = attach(model, config.rank, target_modules=config.lora_target_modules, xgblora=config.xgblora)
    trainer = Trainer(model, config, adapters, examples(40))
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    config.elsewhere = True
    assert trainer.training_step(model, batch).device.type == "meta"


def test_adapters_of_the_library_are_not_stamped_with_a_task(tmp_path: Path) -> None:
    """Rows of one's own are of no task that this package knows."""
    trainer, _ = train(tmp_path, max_steps=1)
    trainer.ledger.save(tmp_path / "adapter")
    assert verify(tmp_path / "adapter")["task"] is None


def test_no_rows_are_refused_in_one_line(tmp_path: Path) -> None:
    model = build(ARCHITECTURES["opt"])
    trainer = Trainer(model, RunConfig(output_dir=str(tmp_path), use_cpu=True), attach(model), examples(4))
    with pytest.raises(XgbloraError, match="there are no rows to evaluate"):
        trainer.evaluate()
    with pytest.raises(XgbloraError, match="there are no rows to evaluate"):
        trainer.evaluate([])


def test_layers_that_do_not_train_get_no_gradient(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"trainer": "regular", "max_steps": 1, "lora": True, "layers": LayerSubset(1, "top")}
    trainer, _ = train(tmp_path, **flags, weight_decay=0.1)
    first = next(iter(trainer.adapters.layers.values()))
    fresh = next(iter(attach(build(ARCHITECTURES["opt"]), rank=8, seed=trainer.args.seed).layers.values()))
    assert torch.equal(first.lora_A, fresh.lora_A)
