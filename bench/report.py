"""What the measurements say: medians, spread, ratios; as a table, as JSON, as a picture."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

from bench.workloads import Sample


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    title: str
    unit: str
    target: float
    """What ours is to reach: of the peer's, of the floor's, or by itself."""
    more_is_better: bool = False
    against: Literal["peer", "floor", "alone"] = "peer"
    floor: str = ""
    """What the floor is: the same work without the platform."""

    def reached(self, value: float) -> bool:
        """Whether a ratio, or a figure of its own, is what was to be reached."""
        return value >= self.target if self.more_is_better else value <= self.target


@dataclass
class Measured:
    """The samples of one workload: ours, the peer's, the floor's; and what went wrong."""

    ours: list[Sample] = field(default_factory=list)
    peer: list[Sample] = field(default_factory=list)
    floor: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def ratio(self, other: Literal["peer", "floor"] = "peer") -> float | None:
        """Median of ours over median of the other's; None where the work differs, failed, or a side is missing."""
        others = getattr(self, other)
        if self.problems or not self.ours or len(others) != len(self.ours):
            return None
        if len({one.work for one in (*self.ours, *others)}) != 1:
            return None
        ours, theirs = _median(self.ours), _median(others)
        return ours / theirs if theirs and math.isfinite(ours / theirs) else None

    def judged(self, workload: Workload) -> float | None:
        """The figure that the workload's target is about."""
        if workload.against == "alone":
            # What the peer could not do says nothing about ours.
            ours_failed = any(not problem.startswith("peer") for problem in self.problems)
            return _median(self.ours) if self.ours and not ours_failed else None
        return self.ratio(workload.against)

    def remarks(self) -> list[str]:
        """What went wrong, or else why there is no ratio."""
        if self.problems or self.ratio() is not None:
            return self.problems
        if not self.ours and not self.peer:
            return ["not run"]
        if not self.ours or not self.peer:
            return [f"only {'ours' if self.ours else 'the peer'} was measured: no ratio"]
        return ["the two sides did different work, or not as often: no ratio"]


def _median(samples: list[Sample]) -> float:
    return statistics.median(one.value for one in samples)


def _spread(samples: list[Sample]) -> tuple[float, float, float]:
    """The least, the median, the most."""
    values = [one.value for one in samples]
    return min(values), _median(samples), max(values)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _told(samples: list[Sample]) -> str:
    if not samples:
        return "-"
    low, middle, high = (_figure(one) for one in _spread(samples))
    return f"{middle} ({low}-{high})"


def table(workloads: dict[str, Workload], measured: dict[str, Measured]) -> str:
    """Median and range of each side, the ratio, and whether it is what was to be reached."""
    lines = [f"{'workload':<48} {'unit':<8} {'ours':>22} {'peer':>22} {'ratio':>7}  to reach"]
    for name, workload in workloads.items():
        found = measured.get(name, Measured())
        ratio = found.ratio()
        said = "-" if workload.against == "alone" else "none" if ratio is None else f"{ratio:.2f}"
        lines.append(
            f"{workload.title:<48} {workload.unit:<8} {_told(found.ours):>22} {_told(found.peer):>22} {said:>7}  "
            + _to_reach(workload, found)
        )
        if found.floor:
            part = found.ratio("floor")
            lines.append(
                f"    {workload.floor}: {_told(found.floor)} {workload.unit}; "
                + (f"ours is {part:.2f} of it" if part is not None else "of different work: no ratio")
            )
        lines += [f"    {remark}" for remark in found.remarks()]
    return "\n".join(lines)


def _to_reach(workload: Workload, found: Measured) -> str:
    sign = ">=" if workload.more_is_better else "<="
    of = {"peer": "", "floor": f" of {workload.floor}", "alone": f" {workload.unit}"}[workload.against]
    figure = found.judged(workload)
    verdict = "" if figure is None else ": yes" if workload.reached(figure) else ": no"
    return f"{sign} {workload.target:g}{of}{verdict}"


def to_json(about: dict[str, Any], workloads: dict[str, Workload], measured: dict[str, Measured], path: Path) -> None:
    """Everything that was measured, with the machine and the versions."""

    def told(samples: list[Sample]) -> dict[str, Any] | None:
        if not samples:
            return None
        least, median, most = _spread(samples)
        return {"median": median, "least": least, "most": most, "samples": [asdict(one) for one in samples]}

    content = {
        "about": about,
        "workloads": {
            name: asdict(workloads[name])
            | {"floor_is": workloads[name].floor}
            | {side: told(getattr(found, side)) for side in COLOURS}
            | {"ratio": found.ratio(), "ratio_to_floor": found.ratio("floor"), "judged": found.judged(workloads[name])}
            | {"remarks": found.remarks()}
            for name, found in measured.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


COLOURS = {"ours": "#2171b5", "peer": "#bdbdbd", "floor": "#74c476"}


def said_of(about: dict[str, Any]) -> str:
    """The day, the machine and the versions in a line, for a picture."""
    words = "{date}, {rounds} round(s); {cpus} x {cpu}, {memory_MiB:,} MiB; Engine {engine}, commit {commit}"
    return words.format(**about)


def picture(about: dict[str, Any], workloads: dict[str, Workload], measured: dict[str, Measured]) -> str:
    """An SVG: for each workload a bar of ours, of the peer and of the floor, the longest of them full width."""
    width, left, bar, full = 860, 290, 12, 380
    lines, y = [], 44
    for name, found in measured.items():
        workload = workloads[name]
        sides = {side: samples for side in COLOURS if (samples := getattr(found, side))}
        lines.append(f'<text x="{left - 10}" y="{y + 10}" text-anchor="end">{workload.title}</text>')
        if found.problems or "ours" not in sides:
            why = escape((found.remarks() or ["not run"])[0][:100])
            lines.append(f'<text x="{left}" y="{y + 10}" fill="#cb181d" font-size="10">{why}</text>')
            y += 2 * bar
            continue
        most = max(max(abs(one.value) for one in samples) for samples in sides.values()) or 1.0
        figure = found.judged(workload)
        if figure is not None and not workload.reached(figure):
            lines.append(
                f'<text x="{left - 10}" y="{y + 23}" text-anchor="end" fill="#cb181d" font-size="10">'
                f"{figure:.2f}, to reach {workload.target:g}</text>"
            )
        for side, samples in sides.items():
            low, middle, high = (max(0.0, value) / most * full for value in _spread(samples))
            lines.append(
                f'<rect x="{left}" y="{y}" width="{max(1.0, middle):.1f}" height="{bar - 2}" fill="{COLOURS[side]}"/>'
            )
            if high > low:
                at = y + bar / 2 - 1
                lines.append(f'<line x1="{left + low:.1f}" x2="{left + high:.1f}" y1="{at}" y2="{at}" stroke="black"/>')
            ratio = found.ratio() if side == "ours" and workload.against != "alone" else None
            said = f"{_figure(_median(samples))} {workload.unit}" + (f" ({ratio:.2f} of the peer)" if ratio else "")
            lines.append(f'<text x="{left + max(1.0, high) + 6:.1f}" y="{y + 9}" font-size="10">{said}</text>')
            y += bar
        y += 12 + bar * max(0, 2 - len(sides))
    key = "".join(
        f'<rect x="{left + 120 * index}" y="14" width="10" height="10" fill="{colour}"/>'
        f'<text x="{left + 120 * index + 15}" y="23">{side}</text>'
        for index, (side, colour) in enumerate(COLOURS.items())
    )
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 24}" '
        'font-family="sans-serif" font-size="12">',
        "<title>Ours beside the official settings</title>",
        f'<rect width="{width}" height="{y + 24}" fill="white"/>',
        key,
        f'<text x="10" y="{y + 14}" font-size="10">{escape(said_of(about))}</text>',
    ]
    return "\n".join([*head, *lines, "</svg>"])
