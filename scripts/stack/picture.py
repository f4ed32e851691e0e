"""The memory plan as a picture: one bar a host, one piece for each service. Pure text (SVG)."""

from __future__ import annotations

from stack.plan import EXAMPLE_HOSTS, Plan, Sizing, make_plan

WIDTH, LEFT, BAR, GAP = 760, 110, 34, 26
COLOURS = {
    "the host's reserve": "#d9d9d9",
    "data: Postgres, Redis, MinIO": "#9ecae1",
    "MLflow": "#6baed6",
    "Airflow: API server, scheduler, DAG processor, triggerer": "#3182bd",
    "worker: Celery, the guard, a supervisor for each task": "#fdae6b",
    "worker: the tasks": "#e6550d",
}


def pieces(made: Plan) -> dict[str, int]:
    """MiB by what it is for, in the order of COLOURS; together the host's memory."""
    limit = {name: one.limit for name, one in made.limits.items()}
    sizes = (
        made.memory - made.total,
        limit["postgres"] + limit["redis"] + limit["minio"],
        limit["mlflow"],
        limit["apiserver"] + limit["scheduler"] + limit["dag_processor"] + limit["triggerer"],
        limit["worker"] - made.task_capacity,
        made.task_capacity,
    )
    return dict(zip(COLOURS, sizes, strict=True))


def render(sizing: Sizing) -> str:
    """The hosts of docs/memory.md's table."""
    plans = [(memory, make_plan(sizing, memory * 1024, cpus)) for memory, cpus in EXAMPLE_HOSTS]
    height = len(plans) * (BAR + GAP) + len(COLOURS) * 20 + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        "<title>What each part of the stack may take, on hosts of different size</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for row, (memory, made) in enumerate(plans):
        top, left = 10 + row * (BAR + GAP), float(LEFT)
        lines.append(f'<text x="{LEFT - 8}" y="{top + 21}" text-anchor="end">{memory} GiB, {made.cpus:g} CPUs</text>')
        for name, mib in pieces(made).items():
            width = (WIDTH - LEFT - 10) * mib / made.memory
            lines.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[name]}"/>')
            left += width
        said = f"{made.worker_slots} slots, {made.task_budget} MiB for each task"
        lines.append(f'<text x="{WIDTH - 10}" y="{top + BAR + 14}" text-anchor="end">{said}</text>')
    for row, (name, colour) in enumerate(COLOURS.items()):
        top = len(plans) * (BAR + GAP) + 20 + row * 20
        lines.append(f'<rect x="{LEFT}" y="{top}" width="14" height="14" fill="{colour}"/>')
        lines.append(f'<text x="{LEFT + 22}" y="{top + 12}">{name}</text>')
    return "\n".join([*lines, "</svg>"])
