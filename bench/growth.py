"""make growth: how this stack's cost grows with the tasks of a run, with its history, and with DAG files.

For each a stack of its own is started from empty volumes, measured and deleted; pictures show the curves.
Load on the machine is heavy on purpose: not beside work that matters.

Changes: nothing of a running stack. Its own Compose project and var/bench are deleted at the end.
Writes, after each part: the figures (--json), the pictures (--pictures, a folder).
Exit: 0 everything could be measured, 1 a part could not; the others are told all the same.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from psycopg2 import sql

from bench import workloads
from bench.report import said_of
from bench.run import RESULTS, about, brief
from bench.systems import Ours, clean, fresh_dags, workplace
from stack.airflow import Airflow
from stack.console import Step, say
from stack.errors import Exit, run_main

FAN_OUT = (50, 200, 1000, 5000)
AT_ONCE = 1000
"""Tasks of one mapped run (Airflow's own bound is 1,024); more are that many runs at once."""
HISTORY_RUNS = 500
"""Of 201 instances each: 10^5 in all."""
FILES = (10, 100, 500)


@dataclass
class Curve:
    """One picture: what was counted, and what it cost."""

    name: str
    title: str
    across: str
    unit: str
    points: list[tuple[int, float]] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)
    """Of each point."""

    def add(self, count: int, values: list[float]) -> None:
        """A point, the median, told at once."""
        self.samples.append(values)
        self.points.append((count, statistics.median(values)))
        spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
        say(f"    {count} {self.across}: {self.points[-1][1]:.3g} {self.unit}{spread}")


def fan_out(airflow: Airflow, tasks: int) -> float:
    """Seconds from the trigger until the last of so many tasks has ended."""
    dag_id = "bench_fan_out"
    sizes = [AT_ONCE] * (tasks // AT_ONCE) or [tasks]
    asked = time.time()
    runs = [airflow.trigger(dag_id, {"tasks": size}) for size in sizes]
    return max(workloads.follow(airflow, dag_id, run_id, 3600) for run_id in runs) - asked


def instances(ours: Ours) -> int:
    """How many task instances there are."""
    with ours.database("airflow") as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM task_instance")
        return int(cursor.fetchone()[0])


def write_history(ours: Ours, dag_id: str, run_id: str) -> None:
    """Copies a run and its task instances HISTORY_RUNS times into the past."""
    with ours.database("airflow") as connection, connection.cursor() as cursor:
        for table in ("dag_run", "task_instance"):
            cursor.execute(
                "SELECT column_name, data_type FROM information_schema.columns"
                " WHERE table_name = %s AND table_schema = 'public'",
                (table,),
            )
            columns, values = [], []
            for name, kind in cursor.fetchall():
                value: sql.Composable = sql.Identifier(name)
                if name == "run_id":
                    value = sql.SQL("'history_' || n")
                elif name == "id":
                    if kind == "integer":
                        continue
                    value = sql.SQL("gen_random_uuid()")
                elif kind.startswith("timestamp"):
                    value = sql.SQL("{} - n * interval '10 minutes'").format(value)
                columns.append(sql.Identifier(name))
                values.append(value)
            copy = sql.SQL(
                "INSERT INTO {} ({}) SELECT {} FROM {} CROSS JOIN generate_series(1, %s) n"
                " WHERE dag_id = %s AND run_id = %s"
            ).format(
                sql.Identifier(table), sql.SQL(", ").join(columns), sql.SQL(", ").join(values), sql.Identifier(table)
            )
            cursor.execute(copy, (HISTORY_RUNS, dag_id, run_id))
            # What Postgres does by itself within a minute.
            cursor.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table)))


def by_tasks(airflow: Airflow, sizes: Sequence[int], curves: list[Curve]) -> None:
    """Seconds of a fan-out."""
    curve = Curve("tasks", "Fan-out of mapped no-op tasks", "tasks", "s")
    curves.append(curve)
    for tasks in sizes:
        with Step(f"fan-out of {tasks}"):
            curve.add(tasks, [fan_out(airflow, tasks)])


def by_history(ours: Ours, airflow: Airflow, rounds: int, curves: list[Curve]) -> None:
    """Seconds of a fan-out of 200, without and with 10^5 task instances of the past. Medians."""
    curve = Curve("history", "Fan-out of 200 beside a history", "task instances of the past", "s")
    curves.append(curve)
    dag_id = "bench_fan_out"
    model = airflow.trigger(dag_id, {"tasks": 200})
    workloads.follow(airflow, dag_id, model)

    def take(title: str) -> None:
        with Step(f"fan-out of 200 {title}"):
            # Without it, too, there is what the warm-up has left.
            curve.add(instances(ours), [fan_out(airflow, 200) for _ in range(rounds)])

    take("without a history")
    with Step("writing the history"):
        write_history(ours, dag_id, model)
    take("with it")


def by_files(ours: Ours, airflow: Airflow, counts: Sequence[int], curves: list[Curve]) -> None:
    """Seconds until that many edited files are visible, and what the stack takes while they lie there."""
    edited = Curve("edited-files", "DAG files edited until the last is visible", "files", "s")
    idle = Curve("idle-files", "Idle CPU beside DAG files", "files", "cores")
    curves += [edited, idle]
    for files in counts:
        with Step(f"{files} DAG files"):
            edited.add(files, [workloads.edits(files)(airflow).value])
            time.sleep(workloads.SETTLE_S)
            idle.add(files, [workloads.idle(60)(ours.project)["idle_cpu"].value])


def measure_apart(ours: Ours, measure: Callable[[Ours, Airflow], None]) -> None:
    """One part, on a stack of its own: what another left behind would be history."""
    clean()
    fresh_dags()
    with Step("start"):
        ours.up()
    with ours.airflow() as airflow:
        airflow.wait_for_dag("bench_fan_out")
        airflow.set_paused("bench_fan_out", False)
        fan_out(airflow, 50)
        measure(ours, airflow)


def picture(curve: Curve, facts: dict[str, object]) -> str:
    """An SVG, both axes logarithmic: cost that grows with its count is a line of the dashed one's slope."""
    width, height, left, bottom, top = 480, 320, 60, 50, 40
    counts, values = ([point[axis] for point in curve.points] for axis in (0, 1))
    first = curve.points[0]
    steady = [(count, first[1] * count / first[0]) for count in (counts[0], counts[-1])]

    def scale(all_values: list[float], start: float, end: float, value: float) -> float:
        low, high = math.log(min(all_values)), math.log(max(all_values))
        return start + (end - start) * ((math.log(value) - low) / (high - low) if high > low else 0.5)

    def at(count: float, value: float) -> tuple[float, float]:
        return (
            scale([float(one) for one in counts], left, width - 40, count),
            scale([min(values) / 1.5, max(values) * 1.5], height - bottom, top, value),
        )

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 12}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height + 12}" fill="white"/>',
        f'<clipPath id="inside"><rect x="{left}" y="{top}" width="{width - left}" '
        f'height="{height - bottom - top}"/></clipPath>',
        f'<text x="{left}" y="22" font-size="14">{curve.title} ({curve.unit})</text>',
        f'<polyline points="{path(steady)}" fill="none" stroke="#aaa" stroke-dasharray="4" clip-path="url(#inside)"/>',
        f'<polyline points="{path(curve.points)}" fill="none" stroke="#2171b5" stroke-width="2"/>',
        f'<line x1="{left}" x2="{width - 20}" y1="{height - bottom}" y2="{height - bottom}" stroke="black"/>',
        f'<text x="8" y="{height + 4}" font-size="8">{escape(said_of(facts))}</text>',
        f'<text x="{width - 20}" y="{height - 12}" text-anchor="end">{curve.across}; dashed: in proportion</text>',
    ]
    for count, value in curve.points:
        x, y = at(count, value)
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2171b5"/>')
        lines.append(f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{value:.3g}</text>')
        lines.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{count}</text>')
    return "\n".join([*lines, "</svg>"])


def main(argv: Sequence[str]) -> int:
    """Measures the curves and draws them."""
    parser = argparse.ArgumentParser(prog="make growth", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of which the history's medians are taken")
    parser.add_argument("--only", choices=["tasks", "history", "files"], action="append")
    parser.add_argument("--most", type=int, default=max(FAN_OUT), help="largest fan-out and number of files")
    parser.add_argument("--json", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--pictures", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    curves: list[Curve] = []
    counts, files = ([count for count in all_of if count <= arguments.most] for all_of in (FAN_OUT, FILES))
    measures: dict[str, Callable[[Ours, Airflow], None]] = {
        "tasks": lambda _, airflow: by_tasks(airflow, counts, curves),
        "history": lambda ours, airflow: by_history(ours, airflow, arguments.rounds, curves),
        "files": lambda ours, airflow: by_files(ours, airflow, files, curves),
    }
    ours, failed, images = Ours(), dict[str, str](), dict[str, str]()
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with workplace():
        for part in arguments.only or measures:
            try:
                measure_apart(ours, measures[part])
                images = ours.images()
            except Exception as error:
                # The points that there are stay, and the other parts go on.
                failed[part] = brief(error)
                say(f"{part} failed: {error}")
            facts = about(arguments.rounds, images, failed=failed)
            told = {curve.name: asdict(curve) for curve in curves}
            arguments.json.write_text(json.dumps({"about": facts, "curves": told}, indent=1) + "\n", encoding="utf-8")
            for curve in curves:
                if curve.points:
                    path = arguments.pictures / f"growth-{curve.name}.svg"
                    path.write_text(picture(curve, facts) + "\n", encoding="utf-8")
    say(f"wrote {arguments.json}, {arguments.pictures}/growth-*.svg")
    return Exit.FAILED if failed else Exit.DONE


if __name__ == "__main__":
    run_main(main)
