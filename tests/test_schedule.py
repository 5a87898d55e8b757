"""Phases, drops and restores against the plan written out iteration by iteration."""

import itertools

import pytest

from repr_det.method.errors import UserError
from repr_det.method.schedule import RePrSchedule


def plan(s1: int, s2: int, cycles: int, start: int, length: int) -> list[str]:
    """The phase of every iteration, as algorithm 1 says it: plain training, N x (S1 full, S2 sub), full to the end."""
    phases = ["full"] * start
    for _ in range(cycles):
        phases += ["full"] * s1 + ["sub"] * s2
    return phases + ["full"] * (length - len(phases))


def test_the_published_setting():
    schedule = RePrSchedule(20, 10, 3)
    assert schedule.drop_iters == (19, 49, 79)
    assert schedule.restore_iters == (29, 59, 89)
    sub = [i for i in range(100) if schedule.phase(i) == "sub"]
    assert sub == [*range(20, 30), *range(50, 60), *range(80, 90)]


@pytest.mark.parametrize(
    ("s1", "s2", "cycles", "start"),
    [(20, 10, 3, 0), (1, 1, 1, 0), (1, 1, 4, 0), (3, 5, 2, 7), (10, 1, 3, 1), (1, 10, 2, 100), (2, 3, 1, 5)],
)
def test_phase_of_every_iteration(s1, s2, cycles, start):
    schedule = RePrSchedule(s1, s2, cycles, start)
    length = start + cycles * (s1 + s2) + 25
    phases = plan(s1, s2, cycles, start, length)
    assert [schedule.phase(i) for i in range(length)] == phases
    # A transition happens at the end of the iteration whose successor sees the other network.
    changes = [(i, after) for i, (before, after) in enumerate(itertools.pairwise(phases)) if before != after]
    assert schedule.drop_iters == tuple(i for i, after in changes if after == "sub")
    assert schedule.restore_iters == tuple(i for i, after in changes if after == "full")
    assert schedule.end_iter == start + cycles * (s1 + s2) == schedule.restore_iters[-1] + 1


@pytest.mark.parametrize(("s1", "s2", "cycles", "start"), [(20, 10, 3, 0), (3, 5, 2, 7), (1, 1, 4, 2)])
def test_cycle_counts_the_restores_so_far(s1, s2, cycles, start):
    schedule = RePrSchedule(s1, s2, cycles, start)
    for i in range(start + cycles * (s1 + s2) + 10):
        assert schedule.cycle(i) == sum(restore < i for restore in schedule.restore_iters)


@pytest.mark.parametrize(
    ("max_iter", "first_step", "cycles", "start", "s1", "s2"),
    [
        (90000, 60000, 3, 0, 10000, 5000),  # 1x
        (270000, 210000, 3, 0, 35000, 17500),  # 3x
        (180000, 120000, 3, 0, 20000, 10000),  # 2x
        (60000, None, 3, 0, 10000, 5000),  # no learning-rate step: of MAX_ITER
        (60000, 90000, 3, 0, 10000, 5000),  # a step that is never reached
        (90000, 60000, 1, 0, 30000, 15000),
        (90000, 60000, 3, 15000, 6666, 3333),
        (12, None, 3, 0, 2, 1),  # the shortest: three quarters of 12 are 9
        (400, 300, 2, 0, 74, 37),  # 225 // 2 = 112 iterations a cycle
    ],
)
def test_derived_schedules(max_iter, first_step, cycles, start, s1, s2):
    schedule = RePrSchedule.derive(max_iter, first_step, cycles, start)
    assert (schedule.s1_iters, schedule.s2_iters) == (s1, s2)
    assert (schedule.num_cycles, schedule.start_iter) == (cycles, start)


def test_derived_schedules_end_in_the_first_three_quarters():
    for horizon in range(12, 400):
        for cycles in (1, 2, 3):
            for start in (0, 2):
                if (horizon * 3 // 4 - start) // cycles < 3:
                    continue
                schedule = RePrSchedule.derive(horizon, None, cycles, start)
                assert schedule.s1_iters == 2 * schedule.s2_iters
                room = horizon * 3 / 4 - schedule.end_iter
                assert 0 <= room < 3 * cycles + 1, (horizon, cycles, start)
                schedule.check_fits(horizon)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((11, None, 3, 0), "num_cycles= 3 cycles of S1 and S2 do not fit between start_iter= 0 and 8"),
        ((90000, 60000, 3, 44999), "start_iter= 44999 and 45000, three quarters of the 60000 iterations"),
        ((90000, 60000, 3, 80000), "do not fit between start_iter= 80000 and 45000"),
        ((90000, 60000, 0, 0), "num_cycles= must be an integer of at least 1, got 0"),
        ((90000, 60000, True, 0), "num_cycles= must be an integer of at least 1, got True"),
        ((90000, 60000, 3, -1), "start_iter= must be an integer of at least 0, got -1"),
    ],
)
def test_schedules_that_cannot_be_derived(arguments, fragment):
    with pytest.raises(UserError) as error:
        RePrSchedule.derive(*arguments)
    assert fragment in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 3, 0), "s1_iters= must be an integer of at least 1, got 0"),
        ((20, 0, 3, 0), "s2_iters= must be an integer of at least 1, got 0"),
        ((20, -5, 3, 0), "s2_iters= must be an integer of at least 1, got -5"),
        ((20, 10, 0, 0), "num_cycles= must be an integer of at least 1, got 0"),
        ((20, 10, 3, -1), "start_iter= must be an integer of at least 0, got -1"),
        ((20.0, 10, 3, 0), "s1_iters= must be an integer of at least 1, got 20.0"),
        (("20", 10, 3, 0), "s1_iters= must be an integer of at least 1, got '20'"),
        ((20, 10, True, 0), "num_cycles= must be an integer of at least 1, got True"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(UserError) as error:
        RePrSchedule(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("start", [0, 10])
def test_a_schedule_needs_one_more_iteration_than_its_cycles(start):
    schedule = RePrSchedule(20, 10, 3, start)
    schedule.check_fits(91 + start)
    assert plan(20, 10, 3, start, 91 + start)[-1] == "full"
    for max_iter in (90 + start, 89 + start, 30):
        with pytest.raises(UserError) as error:
            schedule.check_fits(max_iter)
        assert str(error.value) == (
            f"the schedule of RePr needs start_iter= {start} + num_cycles= 3 x (s1_iters= 20 + s2_iters= 10) = "
            f"{90 + start} iterations and then some of the full network, but total_steps= is {max_iter}: train longer "
            "or shorten the schedule"
        )


def test_a_schedule_cannot_change():
    with pytest.raises(AttributeError):
        RePrSchedule(20, 10, 3).s1_iters = 5
