"""A profile as a table for people."""

from __future__ import annotations

import statistics

from doubleweave.ir.split import Split
from doubleweave.predict.profile import Measured, Profile, uses_cache
from doubleweave.tables import format_table
from doubleweave.timeline.timeline import kind_of


def profile_text(profile: Profile, split: Split) -> str:
    """Each kind of segment: its time by threads and rows; hand-overs, contention, and what auto will do."""
    reads_cache = {kind_of(segment.name) for segment in split.segments if uses_cache(segment)}
    kinds: dict[tuple[str, int], list[Measured]] = {}
    for name, by_threads in profile.segments.items():
        for threads, measured in by_threads.items():
            kinds.setdefault((kind_of(name), threads), []).append(measured)
    rows: list[list[str | int]] = [
        ["segment", "threads", "rows", "us, empty cache", "us, full cache", "spread", "misfit"]
    ]
    rows += [
        [
            kind,
            threads,
            found[0].rows[place],
            f"{statistics.median(m.us[place][0] for m in found):.1f}",
            f"{statistics.median(m.us[place][-1] for m in found):.1f}" if kind in reads_cache else "-",
            f"{statistics.median(m.spread[place] for m in found):.1%}",
            f"{max(m.misfit[place] for m in found):.1%}",
        ]
        for (kind, threads), found in sorted(kinds.items())
        for place in sorted({0, len(found[0].rows) - 1})
    ]
    lines = [format_table(rows), ""]
    hand_overs = ", ".join(f"{a} to {b} {us:.1f} us" for (a, b), us in profile.hand_over_us.items())
    lines.append(
        f"hand-over between workers: {hand_overs or 'one worker'}; on one worker {profile.same_worker_us:.1f} us"
    )
    shares = [
        share for by_threads in profile.segments.values() for m in by_threads.values() for share in m.repeated
    ]
    if shares:
        lines.append(
            f"right behind the chunk before, on one worker, a segment that reads the cache takes {min(shares):.0%} to "
            f"{max(shares):.0%} of its time"
        )
    for count, pairs in profile.contention.items():
        slower = ", ".join(f"{a} beside {b} {share:.0%}" for (a, b), share in pairs.items())
        lines.append(f"of {count} workers, each makes another one's task slower: {slower}")
    if profile.decisions:
        lines += ["", "what --schedule auto does:"]
        rows = [["prompt tokens up to", "schedule", "workers", "threads each", "chunks of up to"]]
        rows += [
            [f"{d.tokens:,}", d.choice.schedule, ",".join(d.choice.workers), d.choice.threads, d.choice.chunk]
            for d in profile.decisions
        ]
        lines.append(format_table(rows))
    return "\n".join(lines)
