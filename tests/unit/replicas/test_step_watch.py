"""A step that lasts too long is noticed; slow models, idle engines and frozen supervisors are not blamed."""

from __future__ import annotations

from replicas.supervisor.step_watch import MAX_TICK_S, MIN_COMPARED_STEPS, StepWatch


def wait(watch: StepWatch, *, start_s: float, seconds: float, has_work: bool = True) -> float:
    """Tick ten times a second; returns the time at the end."""
    now_s = start_s
    for _ in range(round(seconds * 10)):
        now_s += 0.1
        watch.tick(now_s, has_work=has_work)
    return now_s


def test_a_step_longer_than_the_floor_is_a_hang() -> None:
    watch = StepWatch(floor_s=2.0)
    now_s = wait(watch, start_s=0.0, seconds=2.0)
    assert not watch.is_stalled
    wait(watch, start_s=now_s, seconds=0.3)
    assert watch.is_stalled


def test_a_step_frame_starts_the_wait_anew() -> None:
    watch = StepWatch(floor_s=2.0)
    now_s = wait(watch, start_s=0.0, seconds=1.9)
    watch.note_step(0.01)
    wait(watch, start_s=now_s, seconds=1.9)
    assert not watch.is_stalled


def test_an_idle_engine_is_not_waited_for() -> None:
    watch = StepWatch(floor_s=2.0)
    wait(watch, start_s=0.0, seconds=60.0, has_work=False)
    assert watch.waited_s == 0.0


def test_slow_steps_raise_the_limit() -> None:
    watch = StepWatch(floor_s=2.0)
    for _ in range(100):
        watch.note_step(0.8)
    assert watch.limit_s == 4.0


def test_one_outlier_in_a_hundred_does_not_set_the_limit() -> None:
    watch = StepWatch(floor_s=0.1)
    for _ in range(199):
        watch.note_step(0.1)
    watch.note_step(50.0)
    assert watch.step_s_p99 == 0.1


def test_a_frame_without_a_pass_says_nothing_of_speed() -> None:
    watch = StepWatch(floor_s=1.0)
    watch.note_step(None)
    assert watch.step_s_p99 == 0.0


def test_a_supervisor_that_was_frozen_does_not_blame_its_ranks() -> None:
    watch = StepWatch(floor_s=2.0)
    watch.tick(0.0, has_work=True)
    watch.tick(3600.0, has_work=True)
    assert watch.waited_s == MAX_TICK_S
    assert not watch.is_stalled


def test_a_step_is_slow_that_lasts_five_times_as_long_as_nearly_all_before_it() -> None:
    watch = StepWatch(floor_s=2.0)
    for _ in range(MIN_COMPARED_STEPS):
        assert not watch.is_slow(60.0), "there is nothing to compare it with yet"
        watch.note_step(0.1)
    assert watch.is_slow(0.51)
    assert not watch.is_slow(0.5)


def test_a_step_of_no_length_to_speak_of_is_never_slow() -> None:
    watch = StepWatch(floor_s=2.0)
    for _ in range(MIN_COMPARED_STEPS):
        watch.note_step(0.001)
    assert not watch.is_slow(0.24)
    assert watch.is_slow(0.25)
