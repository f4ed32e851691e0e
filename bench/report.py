"""What the measurements say: medians, spread, ratios; as a table, as JSON, as a picture."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.workloads import Sample


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    title: str
    unit: str
    target: float
    """Of ours over the peer's where less is better, of the peer's work in the same time where more is."""
    more_is_better: bool = False


@dataclass
class Measured:
    """The samples of one workload, ours and the peer's, and what went wrong."""

    ours: list[Sample] = field(default_factory=list)
    peer: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def ratio(self) -> float | None:
        """Median of ours over median of the peer's; None where the work differs or a side is missing."""
        if not self.ours or not self.peer or len({one.work for one in (*self.ours, *self.peer)}) != 1:
            return None
        ours, peer = (statistics.median(one.value for one in side) for side in (self.ours, self.peer))
        return ours / peer if peer and math.isfinite(ours / peer) else None

    def remarks(self) -> list[str]:
        """What went wrong, or else why there is no ratio."""
        if self.problems or self.ratio() is not None:
            return self.problems
        if not self.ours and not self.peer:
            return ["not run"]
        return ["the two sides did different work: no ratio"]


def _told(samples: list[Sample]) -> str:
    if not samples:
        return "-"
    values = [one.value for one in samples]
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def table(workloads: dict[str, Workload], measured: dict[str, Measured]) -> str:
    """Median and range of each side, the ratio, and whether it is what was to be reached."""
    lines = [f"{'workload':<38} {'unit':<8} {'ours':>22} {'peer':>22} {'ratio':>7} {'to reach':>9}"]
    for name, workload in workloads.items():
        found = measured.get(name, Measured())
        ratio = found.ratio()
        sign = ">=" if workload.more_is_better else "<="
        said = f"{ratio:.2f}" if ratio is not None else "none"
        lines.append(
            f"{workload.title:<38} {workload.unit:<8} {_told(found.ours):>22} {_told(found.peer):>22} {said:>7} "
            f"{sign + f' {workload.target:.2f}':>9}"
        )
        lines += [f"    {remark}" for remark in found.remarks()]
    return "\n".join(lines)


def to_json(about: dict[str, Any], workloads: dict[str, Workload], measured: dict[str, Measured], path: Path) -> None:
    """Everything that was measured, with the machine and the versions."""
    content = {
        "about": about,
        "workloads": {
            name: asdict(workloads[name]) | asdict(found) | {"ratio": found.ratio(), "remarks": found.remarks()}
            for name, found in measured.items()
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def picture(workloads: dict[str, Workload], measured: dict[str, Measured]) -> str:
    """An SVG: for each workload ours as a part of the peer's, which is 1; a mark where it should be."""
    shown = [(workloads[name], found.ratio()) for name, found in measured.items() if found.ratio() is not None]
    width, left, row, top = 760, 300, 30, 34
    # Logarithmic, from a twentieth to eight times.
    low, high = math.log(0.05), math.log(8)

    def x(ratio: float) -> float:
        return left + (width - left - 20) * (min(max(math.log(ratio), low), high) - low) / (high - low)

    height = top + row * len(shown) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        "<title>Ours beside the official settings, which are 1</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for mark in (0.1, 0.25, 0.5, 1, 2, 4):
        lines.append(f'<line x1="{x(mark):.0f}" x2="{x(mark):.0f}" y1="{top - 8}" y2="{height - 12}" stroke="#ddd"/>')
        lines.append(f'<text x="{x(mark):.0f}" y="{top - 14}" text-anchor="middle">{mark:g} x</text>')
    for index, (workload, ratio) in enumerate(shown):
        assert ratio is not None
        y = top + index * row
        reached = ratio >= workload.target if workload.more_is_better else ratio <= workload.target
        start, end = sorted((x(1), x(ratio)))
        colour = "#3182bd" if reached else "#e6550d"
        lines.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{workload.title}</text>')
        lines.append(f'<rect x="{start:.1f}" y="{y}" width="{max(1.0, end - start):.1f}" height="20" fill="{colour}"/>')
        lines.append(
            f'<line x1="{x(workload.target):.1f}" x2="{x(workload.target):.1f}" y1="{y - 3}" y2="{y + 23}" '
            'stroke="black" stroke-width="2"/>'
        )
    return "\n".join([*lines, "</svg>"])
