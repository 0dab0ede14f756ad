"""Schedules as data: complete, in Megatron's order, free of dead-lock, and as long as the simulator says."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megadpo.pipeline.fill import with_reference, with_reference_before
from megadpo.pipeline.program import Receive, Send, make_program
from megadpo.pipeline.schedule import (
    AHEAD,
    BACKWARD,
    FORWARD,
    REFERENCE,
    WEIGHTS,
    Op,
    Schedule,
    all_forwards,
    one_forward_one_backward,
    zero_bubble,
)
from megadpo.pipeline.simulate import Costs, ScheduleError, peak_activations, simulate


def test_1f1b_of_two_stages_and_three_micro_batches() -> None:
    def order(text: str) -> tuple[Op, ...]:
        return tuple(Op({"F": FORWARD, "B": BACKWARD}[name[0]], int(name[1])) for name in text.split())

    schedule = one_forward_one_backward(2, 3)
    assert schedule.stages == (order("F0 F1 B0 F2 B1 B2"), order("F0 B0 F1 B1 F2 B2"))


@pytest.mark.parametrize(("num_stages", "num_micro_batches", "num_chunks"), [(2, 4, 2), (4, 8, 2), (4, 12, 3), (2, 2, 3)])
def test_the_interleaved_order_is_megatrons(num_stages: int, num_micro_batches: int, num_chunks: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(num_micro_batches, num_chunks, num_stages)
    for stage, order in enumerate(one_forward_one_backward(num_stages, num_micro_batches, num_chunks).stages):
        assert [(op.micro_batch, op.chunk) for op in order if op.kind == FORWARD] == table
        backwards = [(op.micro_batch, num_chunks - 1 - op.chunk) for op in order if op.kind == BACKWARD]
        assert backwards == table
        lead = min((num_stages - stage - 1) * 2 + (num_chunks - 1) * num_stages, len(table))
        turns = [op.kind for op in order[lead : 2 * len(table) - lead]]
        assert turns == [FORWARD, BACKWARD] * (len(table) - lead)


def test_1f1b_of_two_halves_sends_the_rejected_ones_back_first() -> None:
    def order(text: str) -> tuple[Op, ...]:
        return tuple(
            Op({"F": FORWARD, "B": BACKWARD}[name[0]], int(name[1]), half="cr".index(name[2])) for name in text.split()
        )

    schedule = one_forward_one_backward(2, 2, num_halves=2)
    assert schedule.stages == (
        order("F0c F0r F1c B0r F1r B0c B1r B1c"),
        order("F0c F0r B0r F1c B0c F1r B1r B1c"),
    )


sizes = st.tuples(st.integers(1, 64), st.integers(1, 40), st.integers(1, 3))
all_costs = st.builds(Costs, *[st.floats(0.1, 10)] * 3, message=st.one_of(st.just(0.0), st.floats(0, 3)))


def complete(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """The size with a number of micro-batches that chunks can take turns with."""
    num_stages, num_micro_batches, num_chunks = size
    if num_stages == 1:
        return 1, num_micro_batches, 1
    return num_stages, -(-num_micro_batches // num_stages) * num_stages if num_chunks > 1 else num_micro_batches, num_chunks


def runs_without_buffers(schedule: Schedule, costs: Costs, receives_early: bool = False) -> bool:
    """Whether all programs come to their end if every send waits for its receive and every receive for its send."""
    timing = simulate(schedule, costs)
    programs = [make_program(timing, stage, receives_early) for stage in range(schedule.num_stages)]
    at = [0] * len(programs)

    def entry(stage: int) -> object:
        return programs[stage][at[stage]] if at[stage] < len(programs[stage]) else None

    waiting = list(range(len(programs)))
    while waiting:
        stage = waiting.pop()
        while (here := entry(stage)) is not None:
            if isinstance(here, (Send, Receive)):
                other = here.to if isinstance(here, Send) else here.source
                wanted = Receive(stage, here.op) if isinstance(here, Send) else Send(stage, here.op)
                if entry(other) != wanted:
                    break
                at[other] += 1
                waiting.append(other)
            at[stage] += 1
    return all(entry(stage) is None for stage in range(len(programs)))


@settings(max_examples=12, deadline=None)
@given(sizes, all_costs)
@pytest.mark.slow
def test_no_schedule_can_dead_lock_even_if_nothing_is_buffered(size: tuple[int, int, int], costs: Costs) -> None:
    num_stages, num_micro_batches, num_chunks = complete(size)
    for schedule in (
        one_forward_one_backward(num_stages, num_micro_batches, num_chunks),
        all_forwards(num_stages, num_micro_batches, num_chunks),
        with_reference(one_forward_one_backward(num_stages, num_micro_batches, num_chunks), None, num_micro_batches)[0],
        one_forward_one_backward(num_stages, num_micro_batches, num_halves=2),
        with_reference(one_forward_one_backward(num_stages, num_micro_batches, 1, 2), None, num_micro_batches)[0],
        zero_bubble(num_stages, num_micro_batches),
        with_reference(zero_bubble(num_stages, num_micro_batches), None, num_micro_batches)[0],
    ):
        assert runs_without_buffers(schedule, costs)


@settings(max_examples=25, deadline=None)
@given(sizes, st.lists(st.integers(1, 40), min_size=1, max_size=4), all_costs, st.integers(1, 2))
@example((4, 8, 1), [8, 8, 3], Costs(), 1)
@example((4, 8, 1), [8, 8, 3], Costs(), 2)
@pytest.mark.slow
def test_every_reference_forward_is_done_once_and_in_time(
    size: tuple[int, int, int], following: list[int], costs: Costs, num_halves: int
) -> None:
    num_stages, count, num_chunks = complete(size if num_halves == 1 else (*size[:2], 1))
    counts = [count, *(complete((num_stages, other, num_chunks))[1] for other in following)]
    done = None
    for step, (own, ahead) in enumerate(zip(counts, [*counts[1:], 0], strict=True)):
        before_it = done or (0,) * num_stages
        policy = one_forward_one_backward(num_stages, own, num_chunks, num_halves)
        schedule, done = with_reference(policy, done, ahead, costs)
        reference = all_forwards(num_stages, own, num_chunks, REFERENCE, num_halves)
        for stage, order in enumerate(schedule.stages):
            assert tuple(op for op in order if op.kind in (FORWARD, BACKWARD)) == policy.stages[stage]
            left = [op for op in order if op.kind == REFERENCE]
            assert tuple(left) == reference.stages[stage][before_it[stage] :], f"step {step}"
            assert sum(op.kind == AHEAD for op in order) == done[stage] <= ahead * num_chunks * num_halves
        assert peak_activations(schedule) == peak_activations(policy), "the reference keeps nothing"
        simulate(schedule, costs)  # raises if a backward on the last stage comes before its reference


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(1, 100))
@example(64, 100)
def test_halves_halve_the_bubble_of_1f1b_at_any_depth(num_stages: int, num_micro_batches: int) -> None:
    timing = simulate(one_forward_one_backward(num_stages, num_micro_batches, num_halves=2), Costs().in_halves())
    bubble = (num_stages - 1) / 2
    assert timing.seconds == 3 * (num_micro_batches + bubble)
    assert timing.idle_share == pytest.approx(bubble / (num_micro_batches + bubble))
    most = [min(num_stages - stage + 1, 2 * num_micro_batches) for stage in range(num_stages)]
    assert peak_activations(timing.schedule) == most, "in halves: fewer activations than whole micro-batches"


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 64), st.integers(1, 10_000))
@example(64, 10_000)
@pytest.mark.slow
def test_a_million_operations_are_placed_in_time_in_seconds(num_stages: int, num_micro_batches: int) -> None:
    started = time.process_time()
    timing = simulate(one_forward_one_backward(num_stages, num_micro_batches), Costs())
    assert time.process_time() - started < 20
    assert timing.seconds == 3 * (num_micro_batches + num_stages - 1)
    assert peak_activations(timing.schedule) == [min(num_stages - stage, num_micro_batches) for stage in range(num_stages)]


@pytest.mark.parametrize(("num_stages", "num_micro_batches", "num_chunks"), [(2, 8, 1), (4, 8, 1), (8, 32, 1), (4, 8, 2)])
def test_the_bubble_of_1f1b_is_the_formula_s(num_stages: int, num_micro_batches: int, num_chunks: int) -> None:
    timing = simulate(one_forward_one_backward(num_stages, num_micro_batches, num_chunks), Costs())
    bubble = (num_stages - 1) / num_chunks
    assert timing.idle_shares() == pytest.approx([bubble / (num_micro_batches + bubble)] * num_stages)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 4), (2, 16), (4, 12), (4, 32), (8, 32)])
def test_the_next_step_s_reference_forwards_fill_the_bubbles(num_stages: int, num_micro_batches: int) -> None:
    policy = one_forward_one_backward(num_stages, num_micro_batches)
    base, done = simulate(with_reference_before(policy), Costs()).idle_share, None
    for step in range(4):
        schedule, done = with_reference(policy, done, num_micro_batches)
        share = simulate(schedule, Costs()).idle_share
        assert share <= (0.55 if step == 0 else 0.1) * base


def test_zero_bubble_puts_off_what_no_other_stage_waits_for() -> None:
    def order(text: str) -> tuple[Op, ...]:
        return tuple(Op({"F": FORWARD, "B": BACKWARD, "W": WEIGHTS}[name[0]], int(name[1])) for name in text.split())

    assert zero_bubble(2, 3).stages == (order("F0 F1 B0 W0 F2 B1 W1 B2 W2"), order("F0 B0 F1 B1 W0 F2 B2 W1 W2"))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(1, 100))
@example(64, 100)
def test_zero_bubble_has_a_third_of_the_bubble_and_keeps_no_more_than_the_first_stage(num_stages: int, more: int) -> None:
    num_micro_batches = num_stages + more
    timing = simulate(zero_bubble(num_stages, num_micro_batches), Costs().with_separate_weight_gradients())
    assert timing.seconds == 3 * num_micro_batches + num_stages - 1, "ZB-H1: (stages - 1) (forward + backward - weights)"
    assert max(peak_activations(timing.schedule)) <= num_stages


def test_schedules_that_cannot_be_carried_out_are_told() -> None:
    forward, backward, weights = Op(FORWARD, 0), Op(BACKWARD, 0), Op(WEIGHTS, 0)
    for stages, message in (
        (((forward, backward), (backward, forward)), "its forward does not come before it"),
        (((backward, forward), (forward, backward)), "its forward does not come before it"),
        (((forward, backward), ()), "no operation makes what it reads"),
        (((forward, weights, backward), (forward, backward)), "its backward does not come before it"),
        (((forward, forward), (forward,)), "twice"),
        (((forward, backward), (forward, backward, Op(REFERENCE, 0))), "the reference's forward does not come before it"),
    ):
        with pytest.raises(ScheduleError, match=message):
            simulate(Schedule(stages), Costs())
    halves = [Op(FORWARD, 0), Op(FORWARD, 0, half=1), Op(BACKWARD, 0, half=1), Op(BACKWARD, 0)]
    for order in ((1, 0, 2, 3), (0, 1, 3, 2), (1, 2)):
        with pytest.raises(ScheduleError, match="the other half does not come before it"):
            simulate(Schedule((tuple(halves[place] for place in order),), num_halves=2), Costs())
    first, second = Op(FORWARD, 0), Op(FORWARD, 1)
    crossed = ((first, Op(BACKWARD, 0), second, Op(BACKWARD, 1)), (second, first, Op(BACKWARD, 0), Op(BACKWARD, 1)))
    with pytest.raises(ScheduleError, match="waits for ever"):
        simulate(Schedule(crossed), Costs())
