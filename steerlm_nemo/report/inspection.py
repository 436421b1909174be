"""What `inspect_data.py` found: as facts (JSON), as tables for a terminal and as one page that needs no network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from steerlm_nemo.data.inspection import MOST_PAIRED, Inspection, Leakage, leakage, percentile
from steerlm_nemo.errors import clipped
from steerlm_nemo.report.charts import COLOURS, bar_chart
from steerlm_nemo.report.pages import render

MOST_LANGUAGES = 12
MOST_REJECTS = 20
MOST_ROWS = 40  # of a table
MOST_OF_CELL = 200  # characters; a place is a path
_SHARES = (("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("longest", 1.0))


def leaks_between(files: Sequence[Inspection]) -> list[Leakage]:
    return [leakage(earlier, later) for earlier, later in combinations(files, 2)]


def facts(files: Sequence[Inspection], seq_lens: Sequence[int]) -> dict[str, Any]:
    """Everything found, as JSON."""
    return {
        "files": [_facts(file, seq_lens) for file in files],
        "leakage": [
            {
                "of": leak.of,
                "into": leak.into,
                "conversations": leak.num_conversations,
                "same": leak.num_same,
                "same_prompt": leak.num_same_prompt,
                "examples": [[f"{leak.of}:{one}", f"{leak.into}:{other}"] for one, other in leak.examples],
            }
            for leak in leaks_between(files)
        ],
    }


def _facts(file: Inspection, seq_lens: Sequence[int]) -> dict[str, Any]:
    records = file.records.counts
    counts = file.attributes.counts()
    return {
        "name": file.name,
        "read": records.total(),
        "usable": records["written"],
        "filtered": records["filtered"],
        "rejected": records["rejected"],
        "reasons": dict(file.records.reasons),
        "rejects": [{"where": where, "reason": reason} for where, reason in file.rejects],
        "types": dict(file.types),
        "conversations": file.num_conversations,
        "turns": _sizes(file.turns),
        "tokens": _sizes(file.tokens),
        "truncation": [
            {
                "seq_len": cut.seq_len,
                "cut": cut.num_cut,
                "tokens_lost": cut.num_tokens_lost,
                "without_target": cut.num_without_target,
            }
            for cut in map(file.longer_than, seq_lens if file.tokens else ())
        ],
        "with_marker_texts": file.num_with_markers if file.tokens else None,
        "speakers": {
            role: {
                "turns": turns,
                "graded": file.graded_turns_of[role],
                "mean_characters": round(file.characters[role] / turns, 1),
            }
            for role, turns in file.turns_of.items()
        },
        "languages": dict(file.languages.most_common()),
        "responses": file.num_responses,
        "attributes": {
            name: {
                "count": values.total(),
                "coverage": _share(values.total(), file.num_responses),
                "mean": round(_mean(values), 4),
                "grades": {str(value): values[value] for value in sorted(values)},
            }
            for name, values in counts.items()
        },
        "correlation": {
            one: {
                other: None if (r := file.attributes.correlation(one, other)) is None else round(r, 4)
                for other in [*counts][:MOST_PAIRED]
            }
            for one in [*counts][:MOST_PAIRED]
        },
        "duplicates": file.num_duplicates,
        "duplicate_examples": [[f"{file.name}:{one}", f"{file.name}:{other}"] for one, other in file.duplicates],
        "different_prompts": len(file.prompts),
    }


def _sizes(counts: Counter[int]) -> dict[str, Any]:
    if not counts:
        return {}
    total = sum(size * times for size, times in counts.items())
    shares = {name.replace(" %", "_percent"): percentile(counts, share) for name, share in _SHARES}
    return {"total": total, "mean": round(total / counts.total(), 1), **shares}


def _mean(counts: Counter[int]) -> float:
    return sum(value * times for value, times in counts.items()) / counts.total()


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


# --- tables, for both the terminal and the page ---

Rows = list[tuple[str, ...]]  # the first holds the headings


def _overview(files: Sequence[Inspection]) -> Rows:
    names = [_short(file.name, files) for file in files]
    rows: Rows = [("", *names)]

    def row(title: str, cells: Iterable[object]) -> None:
        rows.append((title, *(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells)))

    row("records read", (file.records.counts.total() for file in files))
    row("  usable", (file.records.counts["written"] for file in files))
    row("  filtered", (file.records.counts["filtered"] for file in files))
    row("  rejected", (file.records.counts["rejected"] for file in files))
    row("conversations", (file.num_conversations for file in files))
    row("  types", (", ".join(file.types) for file in files))
    row("  duplicates", (_of(file.num_duplicates, file.num_conversations) for file in files))
    row("  different first turns", (len(file.prompts) for file in files))
    row("turns", (sum(size * times for size, times in file.turns.items()) for file in files))
    row("responses", (file.num_responses for file in files))
    row("  graded", (_of(file.num_graded_responses, file.num_responses) for file in files))
    if any(file.tokens for file in files):
        row("tokens", (sum(size * times for size, times in file.tokens.items()) for file in files))
        row("with marker texts in content", (file.num_with_markers for file in files))
    return rows


def _lengths(files: Sequence[Inspection]) -> Rows:
    rows: Rows = [("per conversation", "mean", *(name for name, _ in _SHARES))]
    for file in files:
        for what, counts in (("turns", file.turns), ("tokens", file.tokens)):
            if counts:
                mean = sum(size * times for size, times in counts.items()) / counts.total()
                sizes = (f"{percentile(counts, share):,}" for _, share in _SHARES)
                rows.append((f"{what}, {_short(file.name, files)}", f"{mean:,.1f}", *sizes))
    return rows


def _truncation(files: Sequence[Inspection], seq_lens: Sequence[int]) -> Rows:
    rows: Rows = [("at a seq_len of", "file", "cut", "tokens lost", "without a target")]
    for seq_len in seq_lens:
        for file in files:
            if file.tokens:
                cut, total = file.longer_than(seq_len), sum(size * times for size, times in file.tokens.items())
                rows.append(
                    (
                        f"{seq_len:,}",
                        _short(file.name, files),
                        _of(cut.num_cut, file.num_conversations),
                        _of(cut.num_tokens_lost, total),
                        _of(cut.num_without_target, file.num_conversations),
                    )
                )
    return rows


def _speakers(files: Sequence[Inspection]) -> Rows:
    rows: Rows = [("speaker", "file", "turns", "graded", "mean characters")]
    for role in dict.fromkeys(role for file in files for role in file.turns_of):
        for file in files:
            if turns := file.turns_of[role]:
                graded, mean = _of(file.graded_turns_of[role], turns), f"{file.characters[role] / turns:,.0f}"
                rows.append((role, _short(file.name, files), f"{turns:,}", graded, mean))
    return rows


def _attributes(files: Sequence[Inspection]) -> Rows:
    rows: Rows = [("attribute of responses", "file", "graded", "mean", "values")]
    for name in _attribute_names(files):
        for file in files:
            if values := file.attributes.counts().get(name):
                each = "  ".join(f"{value}: {values[value] / values.total():.1%}" for value in sorted(values))
                graded = _of(values.total(), file.num_responses)
                rows.append((name, _short(file.name, files), graded, f"{_mean(values):.2f}", each))
    return rows


def _languages(files: Sequence[Inspection]) -> Rows:
    total = sum((file.languages for file in files), Counter[str]())
    rows: Rows = [("language", *(_short(file.name, files) for file in files))]
    for language, _ in total.most_common(MOST_LANGUAGES):
        rows.append((language, *(_of(file.languages[language], file.languages.total()) for file in files)))
    others = [language for language, _ in total.most_common()[MOST_LANGUAGES:]]
    if others:
        counts = (sum(file.languages[language] for language in others) for file in files)
        cells = (_of(count, file.languages.total()) for count, file in zip(counts, files, strict=True))
        rows.append((f"{len(others)} others", *cells))
    return rows


def _shared(files: Sequence[Inspection]) -> Rows:
    rows: Rows = [("conversations of", "found in", "the same", "the same first turn", "for example")]
    for leak in leaks_between(files):
        example = "; ".join(f"line {one} is line {other}" for one, other in leak.examples[:2])
        rows.append(
            (
                _short(leak.of, files),
                _short(leak.into, files),
                _of(leak.num_same, leak.num_conversations),
                _of(leak.num_same_prompt, leak.num_conversations),
                example,
            )
        )
    return rows


def _rejects(files: Sequence[Inspection]) -> Rows:
    rows: Rows = [("filtered or rejected because", "file", "records")]
    for file in files:
        rows += [(reason, _short(file.name, files), f"{n:,}") for reason, n in file.records.reasons.most_common()]
    return rows


def _places(files: Sequence[Inspection]) -> Rows:
    rows: Rows = [("rejected at", "because")]
    for file in files:
        rows += [(where, reason[:120]) for where, reason in file.rejects[:MOST_REJECTS]]
        if (more := len(file.rejects) - MOST_REJECTS) > 0:
            rows.append((f"and {more} more of {_short(file.name, files)}", "see --json for all"))
    return rows


def _attribute_names(files: Sequence[Inspection]) -> list[str]:
    return list(dict.fromkeys(name for file in files for name in file.attributes.counts()))


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else "0"


def _short(name: str, files: Sequence[Inspection]) -> str:
    """The file's name, with its folder only where another has the same."""
    short = Path(name).name
    return name if sum(Path(file.name).name == short for file in files) > 1 else short


def text_report(files: Sequence[Inspection], seq_lens: Sequence[int]) -> str:
    """All tables, for a terminal."""
    tables = [table for _, table in _tables(files, seq_lens)]
    for file in files:
        if names := list(file.attributes.counts())[:MOST_ROWS]:
            head = f"correlation, {_short(file.name, files)}"
            rows: Rows = [(head, *(name[:10] for name in names))]
            for one in names:
                cells = (_r(file.attributes.correlation(one, other)) for other in names)
                rows.append((clipped(one, MOST_OF_CELL), *cells))
            tables.append(rows)
    return "\n\n".join(_aligned(table) for table in tables) + "\n"


def _tables(files: Sequence[Inspection], seq_lens: Sequence[int]) -> list[tuple[str, Rows]]:
    """Title and rows of every table that has any."""
    every = [
        ("Overview", _overview(files)),
        ("Filtered and rejected", _rejects(files)),
        ("Rejected records", _places(files)),
        ("Length", _lengths(files)),
        ("What training would lose", _truncation(files, seq_lens)),
        ("Speakers", _speakers(files)),
        ("Attributes", _attributes(files)),
        ("Languages of turns", _languages(files)),
        ("Shared between files", _shared(files)),
    ]
    return [(title, _bounded(rows)) for title, rows in every if len(rows) > 1]


def _bounded(rows: Rows) -> Rows:
    """As many rows as can be read, and cells that leave room for the others; places and reasons are whole."""
    kept: Rows = [tuple(clipped(cell, MOST_OF_CELL) for cell in row[:-1]) + row[-1:] for row in rows[: MOST_ROWS + 1]]
    if more := len(rows) - len(kept):
        kept.append((f"and {more:,} more", *[""] * (len(rows[0]) - 1)))
    return [(*row[:-1], clipped(row[-1], 1000)) for row in kept]


def _r(correlation: float | None) -> str:
    return "n/a" if correlation is None else f"{correlation:.2f}"


# A count, a mean or a share: `12`, `1,024 (3.1%)`, `-0.25`, `n/a`.
_is_figure = re.compile(r"-?[\d,.]+( \(.+%\))?|n/a").fullmatch


def _aligned(rows: Rows) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    figures = [all(_is_figure(row[column]) for row in rows[1:]) for column in range(len(widths))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, figures, strict=True)
        ).rstrip()
        for row in rows
    )


@dataclass(frozen=True)
class _Chart:
    svg: Markup
    name: str = ""
    note: str = ""


def html_report(files: Sequence[Inspection], seq_lens: Sequence[int]) -> str:
    """The same tables with charts."""
    names = [_short(file.name, files) for file in files]
    return render(
        "inspection",
        helpers={"figure": _is_figure},
        title=f"Data: {', '.join(names)}",
        files=names,
        colours=COLOURS,
        tables=_tables(files, seq_lens),
        charts={
            "Length": _length_charts(files),
            "Attributes": _attribute_charts(files),
            "Languages of turns": _language_charts(files),
        },
        correlations=_correlations(files),
    )


def _length_charts(files: Sequence[Inspection]) -> list[_Chart]:
    drawn = []
    for what, counters in (("tokens", [file.tokens for file in files]), ("turns", [file.turns for file in files])):
        if not any(counters):
            continue
        bounds = _bounds(max(max(counter, default=0) for counter in counters), doubling=what == "tokens")
        labels = [f"{low}" if low == high else f"≤{high}" for low, high in bounds]
        bars = {
            _short(file.name, files): [
                sum(times for size, times in counter.items() if low <= size <= high) / (counter.total() or 1)
                for low, high in bounds
            ]
            for file, counter in zip(files, counters, strict=True)
        }
        svg = bar_chart(bars, labels, f"{what} per conversation", "conversations", width=520, height=220)
        drawn.append(_Chart(svg))
    return drawn


def _bounds(largest: int, doubling: bool) -> list[tuple[int, int]]:
    """Ranges that hold 0 to `largest`: doubling from 64 on, or single sizes up to 12 and the rest doubling."""
    bounds = [(0, 64)] if doubling else [(size, size) for size in range(1, min(largest, 12) + 1)]
    while bounds[-1][1] < largest:
        bounds.append((bounds[-1][1] + 1, bounds[-1][1] * 2))
    return bounds


def _attribute_charts(files: Sequence[Inspection]) -> list[_Chart]:
    # One scale for all, so that the charts can be compared.
    seen = {value for file in files for counter in file.attributes.counts().values() for value in counter}
    scale = range(min(seen, default=0), max(seen, default=0) + 1)
    drawn = []
    for name in _attribute_names(files):
        counters: Mapping[str, Counter[int]] = {
            _short(file.name, files): file.attributes.counts().get(name, Counter()) for file in files
        }
        bars = {
            short: [counter[value] / (counter.total() or 1) for value in scale] for short, counter in counters.items()
        }
        means = ", ".join(f"{_mean(counter):.2f}" for counter in counters.values() if counter)
        svg = bar_chart(bars, [str(value) for value in scale], "value", "", width=250, height=150)
        drawn.append(_Chart(svg, name, f"mean {means}"))
    return drawn


def _correlations(files: Sequence[Inspection]) -> list[tuple[str, list[str], list[list[float | None]]]]:
    """File, names of its attributes and their correlations, where there are several."""
    tables = []
    for file in files:
        names = list(file.attributes.counts())
        names = names[:MOST_ROWS]
        if len(names) > 1:
            cells = [[file.attributes.correlation(one, other) for other in names] for one in names]
            tables.append((_short(file.name, files), names, cells))
    return tables


def _language_charts(files: Sequence[Inspection]) -> list[_Chart]:
    total = sum((file.languages for file in files), Counter[str]())
    if len(total) < 2:
        return []
    shown = [language for language, _ in total.most_common(MOST_LANGUAGES)]
    bars = {
        _short(file.name, files): [file.languages[one] / (file.languages.total() or 1) for one in shown]
        for file in files
    }
    return [_Chart(bar_chart(bars, shown, "language", "turns", width=1040, height=200))]
