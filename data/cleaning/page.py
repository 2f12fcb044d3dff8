"""The report as one page of HTML: tables, histograms with the thresholds drawn, samples of what was dropped.

The page holds all that it shows, and loads nothing.
"""

import html
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.cleaning import scores
from data.cleaning.judging import final_documents, read_judged
from data.cleaning.outcomes import STATUSES, Outcomes
from data.cleaning.passes import Piece
from data.cleaning.report import histograms, samples, score_histogram, score_limits
from data.cleaning.rules import Rule
from data.cleaning.text import words
from data.cleaning.text.features import FEATURES
from data.cleaning.writing import why
from minillm.base.printing import visible

SAMPLES = 5  # documents shown of each reason
SHOWN = 360  # characters of each
WIDTH, HEIGHT = 300, 90  # of a histogram, in pixels
SPANS = {"sales": words.SALES, "tags": words.TAG, "page_code": words.CODE_OF_PAGES, "long_runs": words.LONG_RUN}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 1.4rem; border-radius: 4px; overflow: hidden; margin: .6rem 0; }
.kept { background: #3a8f5c; } .mended { background: #8cc3a0; } .dropped { background: #c8503c; }
.duplicate { background: #d9a441; } .key { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem; }
figure { margin: 0; width: 300px; } figcaption { font-size: .82rem; }
svg text { font: 10px system-ui, sans-serif; fill: #666; }
.sample { border-left: 3px solid #c8503c; margin: .6rem 0; padding: .1rem .8rem; overflow-wrap: anywhere; }
.sample small { color: #666; } .text { white-space: pre-wrap; } mark { background: #ffe08a; }
"""


def page(result: dict, pieces: list[Piece], judged: list[Path], found: Outcomes, rules: list[Rule], how: tuple) -> str:
    """The whole page. result: as report.json has it. how: (recurring lines,), what reading the documents needs."""
    parts = [*_overview(result)]
    if rules:
        parts += ["<h2>Features, before and after</h2>", _LEGEND, '<div class="charts">']
        for name, columns in histograms(judged, found, rules).items():
            of_feature = [rule for rule in rules if rule.feature == name]
            parts.append(_histogram(name, columns, of_feature, FEATURES[name]))
        parts.append("</div>")
    if found.scores:
        parts += ["<h2>Scores</h2>", _LEGEND, '<div class="charts">']
        for name in found.scores:
            drawn = score_limits(found, name)
            parts.append(_histogram(name, score_histogram(found, name), drawn, scores.MEANING[name]))
        parts.append("</div>")
    parts.append("<h2>Samples of what was dropped</h2>")
    for reason, counts in sorted(result["by_reason"].items(), key=lambda item: -item[1]["documents"]):
        if counts["documents"]:
            parts.append(f"<h3>{_escape(reason)} ({counts['documents']:,})</h3>")
            for number in samples(found, reason, SAMPLES):
                parts += _sample(number, reason, pieces, judged, found, (rules, *how))
    title = "What became of the texts"
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    return "\n".join(['<!doctype html><html lang="en">', head, f"<body><h1>{title}</h1>", *parts, "</body></html>", ""])


def _escape(text: str) -> str:
    return html.escape(visible(text))


# ---- Tables.


def _overview(result: dict) -> Iterator[str]:
    n_read = max(result["read"]["documents"], 1)
    yield '<div class="bar">'
    yield from (
        f'<div class="{name}" style="width:{100 * result[name]["documents"] / n_read:.2f}%"></div>' for name in STATUSES
    )
    yield "</div><table>"
    yield '<tr><th></th><th class="n">documents</th><th class="n">share</th><th class="n">MB</th></tr>'
    for name in ("read", *STATUSES):
        counts = result[name]
        key = f'<span class="key {name}"></span>' if name != "read" else ""
        cells = (f"{counts['documents']:,}", f"{counts['documents'] / n_read:.1%}", f"{counts['bytes'] / 1e6:,.2f}")
        yield _row([f"{key}{name}"], cells)
    yield "</table><h2>Why</h2><table>"
    yield _row(["<b>reason</b>", "<b>limit</b>"], ("<b>first reason</b>", "<b>holds for</b>", "<b>MB</b>"))
    for name, counts in sorted(result["by_reason"].items(), key=lambda item: -item[1]["documents"]):
        limit = f"{counts['feature']} {counts['limit']}" if "limit" in counts else ""
        cells = (
            f"{counts['documents']:,}",
            f"{counts.get('any_hit', counts['documents']):,}",
            f"{counts['bytes'] / 1e6:,.2f}",
        )
        yield _row([_escape(name), _escape(limit)], cells)
    yield "</table>"
    for title, key in (("Flagged, and kept", "flagged"), ("Mended", "mended_by")):
        if any(result[key].values()):
            yield f"<h2>{title}</h2><table>"
            for name, n in sorted(result[key].items(), key=lambda item: -item[1]):
                yield _row([_escape(name)], (f"{n:,}",))
            yield "</table>"
    for title, key in (("By language", "by_language"), ("By file", "by_source")):
        yield f"<h2>{title}</h2><table>"
        yield _row([""], [f"<b>{name}</b>" for name in ("read", *STATUSES)])
        for name, counts in list(result[key].items())[:100]:
            yield _row([_escape(name)], [f"{counts[status]:,}" for status in ("read", *STATUSES)])
        yield "</table>"


def _row(names, numbers) -> str:
    cells = "".join(f"<td>{name}</td>" for name in names) + "".join(f'<td class="n">{n}</td>' for n in numbers)
    return f"<tr>{cells}</tr>"


# ---- Histograms.

_LEGEND = (
    '<p><span class="key" style="background:#d8d8d8"></span>all documents<span class="key kept"></span>those kept; '
    "heights are square roots of counts; the red line is the threshold.</p>"
)


def _histogram(name: str, columns: dict, rules: list[Rule], meaning: str) -> str:
    """One histogram as SVG; a last bin holds what lies beyond. rules: those whose limits are drawn."""
    top = max(np.sqrt(columns["all"].max()), 1)
    n_bins = len(columns["all"])
    width = WIDTH / n_bins
    shapes = []
    for key, color in (("all", "#d8d8d8"), ("kept", "#3a8f5c")):
        for number, count in enumerate(columns[key]):
            if count:
                height = max(np.sqrt(count) / top * HEIGHT, 1)
                place = (
                    f'x="{number * width:.1f}" y="{HEIGHT - height:.1f}" width="{width - 1:.1f}" height="{height:.1f}"'
                )
                shapes.append(f'<rect {place} fill="{color}"><title>{key}: {count:,}</title></rect>')
    edges = columns["edges"]
    for rule in rules:
        limit = rule.above if rule.above is not None else rule.below
        x = float(np.interp(limit, edges, np.arange(len(edges)))) * width
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}" stroke="#c8001e" stroke-width="1.5"/>')
    shapes.append(f'<text x="0" y="{HEIGHT + 12}">{edges[0]:.3g}</text>')
    shapes.append(f'<text x="{WIDTH}" y="{HEIGHT + 12}" text-anchor="end">{edges[-1]:.3g} and more</text>')
    drawn = f'<svg width="{WIDTH}" height="{HEIGHT + 16}">{"".join(shapes)}</svg>'
    said = ", ".join(f"{rule.name} {rule.limit()}" for rule in rules)
    return f"<figure>{drawn}<figcaption><b>{name}</b> {_escape(said)}<br>{_escape(meaning)}</figcaption></figure>"


# ---- Samples.


def _sample(
    number: int, reason: str, pieces: list[Piece], judged: list[Path], found: Outcomes, how: tuple
) -> Iterator[str]:
    """A dropped document with its value; of a copy also the document that is kept."""
    rules, recurring = how
    piece, place = found.place(number)
    document = final_documents(pieces[piece].stem, recurring)[place]
    about = why(reason, rules, read_judged(judged[piece]), place) | scores.why(found, number)
    value = f"{about['value']} {about.get('limit', '')}" if "value" in about else ""
    value = document["bad"][1] if "bad" in document else value
    if found.original[number] >= 0:
        value = f"similarity {found.similarity[number]:.2f}"
    file = pieces[piece].source.name(document["file"])
    yield f'<div class="sample"><small>{_escape(file)}:{document["number"]} · {_escape(str(value))}</small>'
    yield f'<div class="text">{_shown(document["text"] or str(document["row"]), reason)}</div>'
    if found.original[number] >= 0:
        piece, place = found.place(int(found.original[number]))
        original = final_documents(pieces[piece].stem, recurring)[place]
        file = pieces[piece].source.name(original["file"])
        yield f"<small>kept in its place: {_escape(file)}:{original['number']}</small>"
        yield f'<div class="text">{_shown(original["text"], "")}</div>'
    yield "</div>"


def _shown(text: str, reason: str) -> str:
    """The beginning of a text, or what lies around the first place that a rule found, which is marked."""
    match = SPANS[reason].search(text) if reason in SPANS else None
    if match is None:
        return _escape(text[:SHOWN]) + (" …" if len(text) > SHOWN else "")
    begin = max(0, match.start() - SHOWN // 2)
    end = match.end() + SHOWN // 2
    before, after = text[begin : match.start()], text[match.end() : end]
    return f"{'… ' * (begin > 0)}{_escape(before)}<mark>{_escape(match[0][:SHOWN])}</mark>{_escape(after)}"
