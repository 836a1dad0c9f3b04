"""When merges happen: the closed form, and that nothing else decides."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import train
from xgblora import RunConfig, XgbloraError
from xgblora.adapters.files import LEDGER
from xgblora.learn.schedule import Patience, PatienceState, Schedule, resolve


def merges(schedule: Schedule, losses: list[float] | None = None, stops: frozenset[int] = frozenset()) -> list[int]:
    """The steps of the merges; after each of ``stops`` all that is known comes from a file."""
    state, steps = PatienceState(), []
    for step in range(1, schedule.total_steps + 1):
        if step - 1 in stops:
            state = PatienceState(**json.loads(json.dumps(state._asdict())))
        state, reason = schedule.observe(state, step, losses[step - 1] if losses else 1.0)
        if reason:
            steps.append(step)
    return steps


def config(**flags: object) -> RunConfig:
    return RunConfig(output_dir="unused", use_cpu=True, **({"xgblora": True} | flags))


@given(total=st.integers(1, 400), every=st.integers(0, 500))
def test_steps_follow_the_closed_form(total: int, every: int) -> None:
    schedule = Schedule(total, every=every)
    wanted = [step for step in range(1, total) if every and step % every == 0]
    assert merges(schedule) == wanted
    assert schedule.expected_merges == len(wanted)


@given(epochs=st.integers(1, 20), per_epoch=st.integers(1, 20), frequency=st.integers(0, 25))
def test_epochs_follow_the_closed_form(epochs: int, per_epoch: int, frequency: int) -> None:
    schedule = resolve(config(xgblora_merge_frequency=frequency), epochs * per_epoch, per_epoch)
    wanted = [e for e in range(1, epochs) if frequency and e % frequency == 0]
    assert merges(schedule) == [e * per_epoch for e in wanted]
    assert schedule.expected_merges == len(wanted)
    assert [schedule.place(e * per_epoch) for e in wanted] == [f"epoch {e}" for e in wanted]


@given(
    max_steps=st.integers(1, 400),
    steps_per_booster=st.integers(0, 120),
    per_epoch=st.integers(1, 40),
    frequency=st.integers(0, 12),
    stops=st.frozensets(st.integers(1, 400), max_size=5),
)
def test_stops_change_no_merge(
    max_steps: int, steps_per_booster: int, per_epoch: int, frequency: int, stops: frozenset[int]
) -> None:
    flags = config(xgblora_steps_per_iteration=steps_per_booster, xgblora_merge_frequency=frequency)
    every = steps_per_booster or frequency * per_epoch
    wanted = [step for step in range(1, max_steps) if every and step % every == 0]
    assert merges(resolve(flags, max_steps, per_epoch), stops=stops) == wanted


@given(
    losses=st.lists(st.floats(0, 10), min_size=2, max_size=60),
    patience=st.integers(1, 10),
    beta=st.sampled_from([0.0, 0.5, 0.9]),
    stops=st.frozensets(st.integers(1, 60), max_size=5),
)
def test_stops_change_no_merge_of_patience(
    losses: list[float], patience: int, beta: float, stops: frozenset[int]
) -> None:
    schedule = Schedule(len(losses), patience=Patience(patience, beta, 0.0, 0, 0))
    assert merges(schedule, losses, stops) == merges(schedule, losses)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_the_trainer_merges_by_the_closed_form_wherever_it_was_stopped(data: st.DataObject) -> None:
    """Real trainings of 4 steps an epoch, by steps or epochs, stopped once and resumed by another process' objects."""
    flags: dict[str, Any] = {"xgblora": True, "zo_directions": data.draw(st.sampled_from(["per_example", "shared"]))}
    flags["trainer"] = data.draw(st.sampled_from(["zo", "regular"]))
    flags["per_device_train_batch_size"] = 16  # of 64 rows
    if data.draw(st.booleans()):
        epochs, frequency = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
        total, every = 4 * epochs, 4 * frequency
        flags |= {"max_steps": -1, "num_train_epochs": epochs, "xgblora_merge_frequency": frequency}
    else:
        total, every = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 5))
        flags |= {"max_steps": total, "xgblora_steps_per_iteration": every}
    stop = data.draw(st.integers(1, total - 1))
    flags |= {"save_strategy": "steps", "save_steps": stop, "save_total_limit": 99}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, losses = train(folder / "whole", **flags)
        resumed, again = train(folder / "resumed", **flags, resume=str(folder / "whole" / f"checkpoint-{stop}"))
        trainers = whole, resumed
        for trainer, there in zip(trainers, ("whole", "resumed"), strict=True):
            trainer.ledger.save(folder / there / "adapter")
        ledgers = [(folder / there / "adapter" / LEDGER).read_bytes() for there in ("whole", "resumed")]
    wanted = [step for step in range(1, total) if every and step % every == 0]
    for trainer in trainers:
        assert [booster.step for booster in trainer.ledger.boosters] == wanted
    assert losses == again
    assert ledgers[0] == ledgers[1]
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        for a, b in zip(mine.pairs(), theirs.pairs(), strict=True):
            assert torch.equal(a, b)


def test_the_documented_cases() -> None:
    assert merges(resolve(config(xgblora_steps_per_iteration=2000), 2000, 100)) == []
    assert merges(resolve(config(xgblora_steps_per_iteration=100), 350, 10)) == [100, 200, 300]
    assert merges(resolve(config(xgblora_merge_frequency=2), 7 * 5, 5)) == [10, 20, 30]
    assert merges(resolve(config(xgblora_merge_frequency=0), 100, 5)) == []


def test_steps_win_over_epochs() -> None:
    both = resolve(config(xgblora_steps_per_iteration=30, xgblora_merge_frequency=1), 100, 10)
    assert merges(both) == [30, 60, 90]
    assert both.place(30) == "step 30"


def test_lora_never_merges() -> None:
    plain = resolve(config(xgblora=False, lora=True, xgblora_steps_per_iteration=10), 100, 10)
    assert merges(plain) == []
    assert plain.expected_merges == 0


def test_patience_by_hand() -> None:
    """ema_beta 0: the loss itself. Falls for 3 steps, then 2 without improvement: merge after step 5, anew."""
    schedule = Schedule(12, patience=Patience(patience=2, ema_beta=0.0, threshold=0.0, min_steps=0, max_steps=0))
    assert merges(schedule, [5, 4, 3, 3, 3, 9, 8, 8, 8, 7, 6, 5]) == [5, 9]
    assert schedule.expected_merges is None


def test_patience_smooths_and_bounds() -> None:
    smooth = Patience(patience=100, ema_beta=0.5, threshold=0.0, min_steps=0, max_steps=0)
    state, reason = smooth.observe(PatienceState(), 4.0)
    state, reason = smooth.observe(state, 2.0)
    assert (state.average, state.best, state.steps, state.stale, reason) == (3.0, 3.0, 2, 0, "")
    flat = [1.0] * 20
    impatient = Patience(patience=1, ema_beta=0.0, threshold=0.0, min_steps=0, max_steps=0)
    assert impatient.observe(PatienceState(4, 1.0, 1.0, 0), 1.0)[1] == "no improvement for 1 steps"
    bounded = Patience(patience=9, ema_beta=0.0, threshold=0.0, min_steps=0, max_steps=5)
    assert bounded.observe(PatienceState(4, 1.0, 1.0, 0), 1.0)[1] == "5 steps, the most of a booster"
    longest = Patience(patience=100, ema_beta=0.0, threshold=0.0, min_steps=0, max_steps=6)
    assert merges(Schedule(20, patience=longest), flat) == [6, 12, 18]
    shortest = Patience(patience=1, ema_beta=0.0, threshold=0.0, min_steps=7, max_steps=0)
    assert merges(Schedule(20, patience=shortest), flat) == [7, 14]
    picky = Patience(patience=3, ema_beta=0.0, threshold=0.5, min_steps=0, max_steps=0)
    assert merges(Schedule(9, patience=picky), [3.0 - 0.1 * i for i in range(9)]) == [4, 8]


@given(st.lists(st.floats(0, 10), min_size=2, max_size=60), st.integers(1, 10))
def test_patience_never_merges_at_the_last_step(losses: list[float], patience: int) -> None:
    schedule = Schedule(len(losses), patience=Patience(patience, 0.9, 0.0, 0, 0))
    assert len(losses) not in merges(schedule, losses)


def test_two_schedules_are_refused() -> None:
    with pytest.raises(XgbloraError, match="two merge schedules"):
        config(xgblora_use_adaptive_merge=True, xgblora_steps_per_iteration=10)
    with pytest.raises(XgbloraError, match="two merge schedules"):
        config(xgblora_use_adaptive_merge=True, xgblora_merge_frequency=3)
    assert resolve(config(xgblora_use_adaptive_merge=True), 100, 10).patience is not None
