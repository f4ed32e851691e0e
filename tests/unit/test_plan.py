"""The memory plan keeps its promises for every host."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack import picture, plan
from stack.errors import StackError
from stack.instance import ROOT

SIZING = plan.load_sizing()


def accepted(memory: int, *, whole: bool = False) -> bool:
    try:
        plan.make_plan(SIZING, memory, 2, whole=whole)
    except StackError:
        return False
    return True


# The smallest host, found from outside: not by the planner's own arithmetic.
SMALLEST = next(memory for memory in range(1, 2**16) if accepted(memory))
memories = st.integers(min_value=SMALLEST, max_value=2**20)
cpu_counts = st.floats(min_value=0.5, max_value=256)


@given(memories, cpu_counts)
def test_limits_fit_the_budget(memory: int, cpus: float) -> None:
    """The sum of all limits is within the budget, and uses nearly all of it."""
    made = plan.make_plan(SIZING, memory, cpus)
    assert made.total <= made.budget <= memory - SIZING.reserve.floor
    assert made.total > made.budget - 8 * len(made.limits)
    kept = max(SIZING.reserve.floor, int(memory * SIZING.reserve.fraction))
    assert memory - made.budget in (kept, kept + 1)


@given(memories, cpu_counts)
def test_every_limit_is_between_floor_and_cap(memory: int, cpus: float) -> None:
    for name, limit in plan.make_plan(SIZING, memory, cpus).limits.items():
        service = SIZING.services[name]
        assert service.floor <= limit.limit <= (service.cap or memory), name
        assert 0 < limit.reservation < limit.limit, name


@given(memories, st.integers(min_value=0, max_value=65536), cpu_counts)
def test_more_memory_never_means_less_for_a_service(memory: int, more: int, cpus: float) -> None:
    small, large = plan.make_plan(SIZING, memory, cpus), plan.make_plan(SIZING, memory + more, cpus)
    for name, limit in small.limits.items():
        # Rounding to 8 MiB may take one step.
        assert large.limits[name].limit >= limit.limit - 8, name
    assert large.worker_slots >= small.worker_slots


@pytest.mark.parametrize("cpus", [0.5, 2, 16])
def test_each_step_of_the_usual_hosts_gives_more(cpus: float) -> None:
    """Every 16 MiB up to 72 GiB: where floors, caps and slots change hands, random sizes rarely fall."""
    before = plan.make_plan(SIZING, SMALLEST, cpus)
    for memory in range(SMALLEST + 16, 72 * 1024, 16):
        made = plan.make_plan(SIZING, memory, cpus)
        for name, limit in before.limits.items():
            assert made.limits[name].limit >= limit.limit - 8, (memory, name)
        assert made.worker_slots >= before.worker_slots, memory
        before = made


@given(memories, cpu_counts)
def test_slots_leave_each_task_its_memory(memory: int, cpus: float) -> None:
    """Never more slots than the worker's memory carries, and each task gets what was promised."""
    made = plan.make_plan(SIZING, memory, cpus)
    worker = SIZING.worker
    assert worker.min_slots <= made.worker_slots <= worker.max_slots
    assert made.task_budget >= worker.task
    used = worker.base + made.worker_slots * (worker.slot + made.task_budget)
    assert used <= made.limits["worker"].limit
    assert made.worker_slots < made.parallelism <= made.worker_slots + 8
    assert made.worker_slots < made.postgres_connections


@pytest.mark.parametrize("whole", [True, False])
@given(data=st.data())
def test_below_the_floor_is_refused_with_the_figure(whole: bool, data: st.DataObject) -> None:
    """Every size below the smallest is refused; STACK_MEMORY needs no reserve for the host."""
    smallest = SIZING.floor if whole else SMALLEST
    assert accepted(smallest, whole=whole)
    memory = data.draw(st.integers(min_value=0, max_value=smallest - 1))
    with pytest.raises(StackError, match=rf" {memory:,} MiB; the stack needs {smallest:,} MiB") as refused:
        plan.make_plan(SIZING, memory, 2, whole=whole)
    assert refused.value.code == "E-MEM-LOW"


def test_the_promised_smallest_host_is_accepted() -> None:
    """README and docs promise 4 GiB, of which the firmware and the kernel keep some."""
    assert SMALLEST <= 3900


@given(memories, cpu_counts)
def test_every_limit_reaches_compose(memory: int, cpus: float) -> None:
    """Each service has both variables, in the plan's figures; Postgres's and Redis's own are within them."""
    made = plan.make_plan(SIZING, memory, cpus)
    values = made.environment()
    for name, limit in made.limits.items():
        assert values[f"{name.upper()}_MEMORY"] == f"{limit.limit}m"
        assert values[f"{name.upper()}_RESERVATION"] == f"{limit.reservation}m"
    buffers = int(values["POSTGRES_SHARED_BUFFERS"].removesuffix("MB"))
    assert 64 <= buffers <= min(128, made.limits["postgres"].limit / 4)
    assert int(values["REDIS_MAXMEMORY"].removesuffix("mb")) < made.limits["redis"].limit
    assert int(values["MINIO_GOMEMLIMIT"].removesuffix("MiB")) < made.limits["minio"].limit


@given(memories, cpu_counts, st.sets(st.sampled_from(sorted(SIZING.opt_in))))
def test_opt_in_services_are_in_the_sum(memory: int, cpus: float, opted: set[str]) -> None:
    """What is on gets its size within the same budget; what is off is known to Compose, and takes nothing."""
    extra = sum(SIZING.opt_in[name].floor for name in opted)
    without = plan.make_plan(SIZING, memory, cpus)
    made = plan.make_plan(SIZING, memory + 2 * extra, cpus, opted=opted)
    assert made.total <= made.budget
    assert set(made.limits) == set(SIZING.services) | opted
    for name, service in SIZING.opt_in.items():
        assert made.environment()[f"{name.upper()}_MEMORY"] == f"{service.floor}m"
    assert made.total >= without.total
    same = plan.make_plan(SIZING, memory + 2 * extra, cpus)
    assert same.limits["worker"].limit >= made.limits["worker"].limit


def test_an_opt_in_service_for_which_there_is_no_room() -> None:
    """The smallest host cannot have it, and is told how much it takes."""
    plan.make_plan(SIZING, SMALLEST, 2)
    with pytest.raises(StackError, match="the stack needs") as refused:
        plan.make_plan(SIZING, SMALLEST, 2, opted={"serving"})
    assert refused.value.code == "E-MEM-LOW"
    assert "SERVING" in str(refused.value)


def test_the_figure_that_a_refusal_names_is_enough() -> None:
    """Whoever gives what the message asks for is let in, however the floors round."""
    for more in range(0, 1024, 37):
        redis = SIZING.services["redis"].model_copy(update={"floor": 96 + more, "cap": None})
        sizing = SIZING.model_copy(update={"services": SIZING.services | {"redis": redis}})
        for whole in (True, False):
            with pytest.raises(StackError) as refused:
                plan.make_plan(sizing, 1024, 2, whole=whole)
            needed = re.search(r"needs ([\d,]+) MiB", refused.value.what)
            assert needed
            plan.make_plan(sizing, int(needed[1].replace(",", "")), 2, whole=whole)


def test_docs_hold_the_table_that_the_program_makes() -> None:
    """docs/memory.md shows the plans of 4 to 64 GiB hosts as they are."""
    assert {memory for memory, _ in plan.EXAMPLE_HOSTS} == {4, 8, 16, 24, 64}
    text = (ROOT / "docs/memory.md").read_text()
    shown = text.split("<!-- plan-table -->")[1].split("<!-- /plan-table -->")[0].strip()
    assert shown == plan.render_examples(SIZING)


def test_the_picture_is_the_plan() -> None:
    """docs/memory.svg is what the program draws, and each bar is a whole host."""
    drawn = (ROOT / "docs/memory.svg").read_text()
    assert drawn.strip() == picture.render(SIZING)
    for memory, cpus in plan.EXAMPLE_HOSTS:
        assert sum(picture.pieces(plan.make_plan(SIZING, memory * 1024, cpus)).values()) == memory * 1024


def test_the_same_host_gives_the_same_plan() -> None:
    first, second = plan.make_plan(SIZING, 9999, 3), plan.make_plan(SIZING, 9999, 3)
    assert first == second
    assert first.environment() == second.environment()
