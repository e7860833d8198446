"""A timeline as a picture: a Gantt chart, and below it the memory in use. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doubleweave.errors import InputError
from doubleweave.timeline.timeline import Event, Timeline

# More hand-overs than this are a grey veil.
_MOST_ARROWS = 60
# A label must have this share of the width of the time axis.
_LABEL_SHARE = 0.035
_INCHES = 14.0


def draw(timeline: Timeline, path: Path) -> None:
    """Write an .svg or .png, by the extension. Raises InputError where matplotlib is missing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "picture: matplotlib is missing; install it with: pip install 'doubleweave[plot]'"
        ) from None
    # Text stays text in an SVG, and the file is the same every time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "doubleweave"}):
        _draw(timeline, path, Figure)


def _draw(timeline: Timeline, path: Path, figure_class: Any) -> None:
    rows = timeline.num_workers
    heights = [0.55 * rows + 0.4] + ([1.5] if timeline.counters else [])
    figure = figure_class(figsize=(_INCHES, sum(heights) + 1.6), layout="constrained")
    axes = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    end_ms = max((event.end_ns for event in timeline.events), default=0) / 1e6
    _gantt(axes[0][0], timeline, end_ms)
    if timeline.counters:
        _memory(axes[1][0], timeline, end_ms)
    axes[-1][0].set_xlabel("time (ms)")
    axes[-1][0].set_xlim(0, end_ms or 1)
    title = timeline.title or "timeline"
    figure.suptitle(f"{title}: {end_ms:,.1f} ms", fontsize=11)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _gantt(axis: Any, timeline: Timeline, end_ms: float) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    # Neighbouring chunks are to differ: ten colours in turn for many, in order of time for few.
    count = 1 + max((event.chunk for event in timeline.events), default=0)
    colours = colormaps["tab10"]
    for worker in range(timeline.num_workers):
        mine = [event for event in timeline.events if event.worker == worker]
        for hatch, is_attention in (("", False), ("////", True)):
            found = [event for event in mine if _is_attention(event) == is_attention]
            if found:
                axis.broken_barh(
                    [(event.start_ns / 1e6, event.duration_ns / 1e6) for event in found],
                    (worker - 0.4, 0.8),
                    facecolors=[colours(event.chunk % 10) for event in found],
                    edgecolor="white",
                    linewidth=0.2 if len(mine) < 500 else 0.0,
                    hatch=hatch if len(mine) < 2000 else None,
                    alpha=0.55 if is_attention else 1.0,
                )
        for event in mine:
            if event.duration_ns / 1e6 >= _LABEL_SHARE * end_ms:
                middle = (event.start_ns + event.end_ns) / 2e6
                axis.text(
                    middle, worker, f"{event.call}\n{event.chunk}", ha="center", va="center", fontsize=6
                )
    if len(timeline.links) <= _MOST_ARROWS:
        for earlier, later in timeline.links:
            source, target = timeline.events[earlier], timeline.events[later]
            axis.annotate(
                "",
                xy=(target.start_ns / 1e6, target.worker),
                xytext=(source.end_ns / 1e6, source.worker),
                arrowprops={"arrowstyle": "->", "color": "0.25", "linewidth": 0.6},
            )
    names = [
        f"worker {w}" + (f" ({timeline.devices[w]})" if timeline.devices else "")
        for w in range(timeline.num_workers)
    ]
    axis.set_yticks(range(timeline.num_workers), names)
    axis.set_ylim(timeline.num_workers - 0.45, -0.55)
    legend = [Patch(facecolor=colours(chunk), label=f"chunk {chunk}") for chunk in range(min(count, 10))]
    if count > 10:
        legend[-1] = Patch(facecolor=colours(9), label=f"chunk 9 (colours repeat, {count} chunks)")
    legend.append(Patch(facecolor="0.6", label="static segment"))
    legend.append(Patch(facecolor="0.6", alpha=0.55, hatch="////", edgecolor="white", label="attention"))
    axis.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6, fontsize=7, frameon=False)


def _memory(axis: Any, timeline: Timeline, end_ms: float) -> None:
    for counter in timeline.counters:
        times = [at / 1e6 for at, _ in counter.samples]
        values = [value / 2**20 if counter.unit == "bytes" else value for _, value in counter.samples]
        axis.step([*times, end_ms], [*values, *values[-1:]], where="post", label=counter.name, linewidth=1)
    axis.set_ylabel("memory (MiB)")
    axis.set_ylim(bottom=0)
    axis.grid(visible=True, axis="y", linewidth=0.3)
    axis.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)


def _is_attention(event: Event) -> bool:
    return event.segment.startswith("attention")
