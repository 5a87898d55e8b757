"""Phases, drops and restores against the plan written out iteration by iteration."""

import itertools

import pytest
from conftest import refused

from repr_det.method.schedule import RePrSchedule


@pytest.mark.parametrize(("s1", "s2", "cycles", "start"), [(20, 10, 3, 0), (1, 1, 1, 0), (3, 5, 2, 7), (1, 10, 2, 100)])
def test_phase_of_every_iteration(s1, s2, cycles, start):
    """As algorithm 1 says it: plain training, N x (S1 full, S2 sub), full to the end."""
    schedule = RePrSchedule(s1, s2, cycles, start)
    phases = ["full"] * start + cycles * (["full"] * s1 + ["sub"] * s2) + ["full"] * 25
    assert [schedule.phase(i) for i in range(len(phases))] == phases
    # A transition happens at the end of the iteration whose successor sees the other network.
    changes = [(i, after) for i, (before, after) in enumerate(itertools.pairwise(phases)) if before != after]
    assert schedule.drop_iters == tuple(i for i, after in changes if after == "sub")
    assert schedule.restore_iters == tuple(i for i, after in changes if after == "full")
    end = start + cycles * (s1 + s2)
    assert schedule.end_iter == end
    for i in range(len(phases)):
        assert schedule.cycle(i) == min(max(i - start, 0) // (s1 + s2), cycles)
    schedule.check_fits(end + 1)  # one more iteration than its cycles
    assert refused(schedule.check_fits, end) == (
        f"RePr needs start_iter= {start} + num_cycles= {cycles} x (s1_iters= {s1} + s2_iters= {s2}) = {end} iterations "
        f"and then some of the full network, but total_steps= is {end}: train longer or shorten the schedule"
    )


@pytest.mark.parametrize(
    ("max_iter", "first_step", "cycles", "start", "s1", "s2"),
    [
        (90000, 60000, 3, 0, 10000, 5000),  # 1x
        (60000, None, 3, 0, 10000, 5000),  # no learning-rate step: of MAX_ITER
        (60000, 90000, 3, 0, 10000, 5000),  # a step that is never reached
        (90000, 60000, 3, 15000, 6666, 3333),
        (12, None, 3, 0, 2, 1),  # the shortest: three quarters of 12 are 9
        (400, 300, 2, 0, 74, 37),  # 225 // 2 = 112 iterations a cycle
    ],
)
def test_derived_schedules(max_iter, first_step, cycles, start, s1, s2):
    assert RePrSchedule.derive(max_iter, first_step, cycles, start) == RePrSchedule(s1, s2, cycles, start)


@pytest.mark.parametrize(
    ("make", "arguments", "told"),
    [
        (RePrSchedule.derive, (11, None, 3, 0), "num_cycles= 3 cycles of S1 and S2 do not fit between start_iter= 0"),
        (RePrSchedule.derive, (90000, 60000, 3, 44999), "start_iter= 44999 and 45000, three quarters of the 60000"),
        (RePrSchedule.derive, (90000, 60000, 0, 0), "num_cycles= must be an integer of at least 1, got 0"),
        (RePrSchedule, (20, 10, 3, -1), "start_iter= must be an integer of at least 0, got -1"),
        (RePrSchedule, (0, 10, 3, 0), "s1_iters= must be an integer of at least 1, got 0"),
        (RePrSchedule, (20, -5, 3, 0), "s2_iters= must be an integer of at least 1, got -5"),
    ],
)  # fmt: skip
def test_what_is_no_schedule(make, arguments, told):
    assert told in refused(make, *arguments)
