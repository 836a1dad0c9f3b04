"""When merges happen: the closed form, and that nothing else decides."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgblora import RunConfig, XgbloraError
from xgblora.schedule import Patience, PatienceState, Schedule, resolve


def merges(schedule: Schedule, losses: list[float] | None = None) -> list[int]:
    state, found = PatienceState(), []
    for step in range(1, schedule.total_steps + 1):
        state, reason = schedule.observe(state, step, losses[step - 1] if losses else 1.0)
        if reason:
            found.append(step)
    return found


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
