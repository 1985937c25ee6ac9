"""Report of one job on one page: table, plots and everything needed to run the job again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from matquant import number_format
from matquant.number_format import is_number
from matquant.report.markup import Markup, element, figure, join, page, section, table
from matquant.report.output_files import write_atomic
from matquant.report.results import (
    BaselineResult,
    JobResults,
    SliceResult,
    cost_sentence,
    failure_sentence,
    refine_sentence,
    task_errors,
    task_scores,
)

FILE_NAME = "report.html"

_CAPTIONS = {
    "kl_bits": "Distance of each slice's predictions from full precision: KL(full precision ‖ slice), mean over tokens. "
    "Lower is better.",
    "perplexity_bits": "Perplexity of each slice. Lower is better; the dashed line is the full-precision model.",
    "kl_bytes": "KL against the bytes of the quantized layers that a runtime reads, scales included.",
}
_UNITS = "MB (10⁶ bytes): read by a runtime for the quantized layers, scales included. KL: nats per token."
_ERROR_NOTE = (
    "Error of each layer's output on the calibration text, relative to that output: "
    "tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ). Each bit-width has its own colour scale; point at a cell to read it."
)
_TASKS_NOTE = (
    "±: one standard error. In brackets: share of the full-precision score that is "
    "kept (a perplexity counts inversely)."
)
_GENERATIONS = (
    "Loss of the fittest allocation after each generation. Each point is measured on newly "
    "drawn tokens, so it may rise."
)
_MAPS = 6  # bit-width maps on one page
_NARROW = 5  # columns of a table that leaves room for a plot beside it


def write_report(results: JobResults, folder: Path) -> Path:
    """Write ``folder/report.html`` and return its path. It opens without a network; equal results give equal bytes."""
    return write_atomic(Path(folder) / FILE_NAME, render(results))


def render(results: JobResults) -> str:
    """Page that `write_report` writes."""
    return page(
        f"{results.model} {results.method}",
        _header(results),
        _failure(results),
        *_slices_and_plots(results),
        _tasks(results),
        _search(results),
        _layers(results),
        _again(results),
        _origin(results),
    )


def _header(results: JobResults) -> Markup:
    heading = element("h1", results.model, " ", element("small", results.method))
    bits = ", ".join(str(one.bits) for one in results.slices if not one.is_allocation)
    facts = [f"{bits} bits" if bits else "no slice evaluated"]
    facts += [f"evaluated on {', '.join(results.datasets)}"] if results.datasets else []
    facts += [number_format.timestamp(results.created)] if results.created else []
    tiles = [element("div", element("dt", name), element("dd", value)) for name, value in _tiles(results)]
    return element(
        "header", heading, element("p", " · ".join(facts), class_="sub"), element("dl", *tiles, class_="tiles")
    )


def _failure(results: JobResults) -> Markup:
    """Stage that failed, if the job did; the rest of the page shows the results of the stages before it."""
    if results.failure is None:
        return Markup()
    note = element("p", "The figures below are those of the stages before it.")
    return element(
        "div", element("strong", failure_sentence(results.failure)), note, class_="warnings failure", role="alert"
    )


def _tiles(results: JobResults) -> list[tuple[str, str]]:
    models = results.parent.stored
    total = sum(model.bytes for model in models if model.bytes is not None)
    reused = bool(models) and all(model.reused for model in models)
    tiles = (
        [("parent" if len(models) < 2 else f"{len(models)} models together", number_format.size(total))]
        if total
        else []
    )
    took = results.seconds.get("quantize")
    tiles += (
        [("quantizing", "reused")]
        if reused
        else [("quantizing", number_format.seconds(took))]
        if is_number(took)
        else []
    )
    for name in results.datasets[:1]:
        full = results.baseline.perplexity.get(name)
        tiles += [("perplexity, full precision", number_format.perplexity(full))] if is_number(full) else []
        for one in sorted(results.slices, key=lambda one: one.position)[:1]:
            label = number_format.slice_name(one.bits)
            tiles += [
                (f"perplexity, {label}", number_format.perplexity(one.perplexity.get(name))),
                (f"KL, {label}", number_format.significant(one.kl.get(name))),
            ]
    return tiles


def _slices_and_plots(results: JobResults) -> list[Markup]:
    """Table with the first plot beside it if it is narrow; then the warnings, then the other plots."""
    slices, columns = _slices(results)
    plots = _plots(results)
    lead = plots[:1] if columns <= _NARROW else []
    rest = plots[len(lead) :]
    sentence = cost_sentence(results.seconds.get("quantize"), results.parent.stored) + refine_sentence(results.refine)
    cost = element("p", f"{sentence} {_UNITS}", class_="note")
    parts = [section("Slices", element("div", element("div", slices, cost), *lead, class_="lead"))]
    parts.append(_warnings(results.warnings))
    if rest:
        parts.append(section("Quality", element("div", *rest, class_="figures")))
    return parts


def _slices(results: JobResults) -> tuple[Markup, int]:
    """Table of the slices, and its number of columns."""
    names = results.datasets
    of = (lambda name: f" {name}") if len(names) > 1 else (lambda name: "")
    header = ["bits", "average bits", "MB"]
    header += [f"perplexity{of(name)}" for name in names] + [f"KL{of(name)}" for name in names]
    entries: list[BaselineResult | SliceResult] = [results.baseline, *results.slices]
    return table(header, [_slice_row(entry, names) for entry in entries]), len(header)


def _slice_row(entry: BaselineResult | SliceResult, names: Sequence[str]) -> list[str]:
    one = entry if isinstance(entry, SliceResult) else None
    row = [
        str(one.bits) if one else "full precision",
        number_format.average_bits(one.average_bits if one else None),
        number_format.megabytes(entry.bytes),
    ]
    row += [number_format.perplexity(entry.perplexity.get(name)) for name in names]
    return row + [number_format.significant(one.kl.get(name) if one else None) for name in names]


def _warnings(warnings: Sequence[str]) -> Markup:
    if not warnings:
        return Markup()
    title = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    items = element("ul", *(element("li", str(warning)) for warning in warnings))
    return element("div", element("strong", title), items, class_="warnings", role="note")


def _plots(results: JobResults) -> list[Markup]:
    from matquant.report.drawing import to_svg
    from matquant.report.plots import job_figures

    drawings = job_figures(results)
    return [figure(to_svg(d, name, _CAPTIONS[name]), _CAPTIONS[name]) for name, d in drawings.items()]


def _tasks(results: JobResults) -> Markup:
    """Every task with its standard errors and the share of the full-precision score that is kept."""
    entries: list[BaselineResult | SliceResult] = [results.baseline, *results.slices]
    names = list(dict.fromkeys(name for entry in entries for name in task_scores(entry.tasks)))
    if not names:
        return Markup()
    rows = []
    for name in names:
        cells = []
        for entry in entries:
            value, error = task_scores(entry.tasks).get(name), task_errors(entry.tasks).get(name)
            kept = entry.recovery.get(name) if isinstance(entry, SliceResult) else None
            text = number_format.score(value) + (
                f" ± {number_format.significant(error, 2)}" if is_number(error) else ""
            )
            cells.append(text + (f" ({kept:.1f} %)" if is_number(kept) else ""))
        rows.append([name, *cells])
    header = ["task", "full precision", *(one.name or number_format.slice_name(one.bits) for one in results.slices)]
    return section("Tasks", table(header, rows), element("p", _TASKS_NOTE, class_="note"))


def _search(results: JobResults) -> Markup:
    """Allocations, generations of the search, and bit-width maps of the first few allocations."""
    from matquant.report.allocation_plots import bits_figure, front_rows, generations_figure
    from matquant.report.drawing import to_svg

    found, search = results.allocations, results.search or {}
    if not found:
        return Markup()
    header = ["allocation", "average bits", "MB", "predicted loss", "measured loss"]
    parts = [table(header, front_rows(results))]
    if search:
        parts.append(element("p", _describe_search(search), class_="note"))
    drawing = generations_figure(search)
    if drawing is not None:
        curves = figure(to_svg(drawing, "generations", _GENERATIONS), _GENERATIONS)
        parts.append(element("div", curves, class_="figures spaced half"))
    for index, one in enumerate(found[:_MAPS]):
        drawing = bits_figure(one, results.layers)
        if drawing is not None:
            average = number_format.average_bits(one.average_bits)
            caption = f"Bit-width of each layer, {one.name or 'allocation'}: {average} bits on average."
            parts.append(figure(to_svg(drawing, f"bits-{index}", caption), caption, class_="map"))
    return section("Allocations", *parts)


def _describe_search(search: Mapping[str, Any]) -> str:
    words = f"{search['method']}: {search['evaluations']:,} evaluations on {search['tokens']:,} tokens together"
    words += f", {search['skipped']:,} proposals skipped by the surrogate" if search.get("skipped") else ""
    rate = search.get("evaluations_per_second")
    words += f"; {number_format.significant(rate)} evaluations a second" if is_number(rate) else ""
    return f"{words}. Losses are {search['fitness']} on the search's text."


def _layers(results: JobResults) -> Markup:
    """Heat map per bit-width; radio buttons select the visible one, the lowest bit-width at first."""
    from matquant.report.drawing import to_svg
    from matquant.report.heatmap import error_bits, layer_figure

    parts: list[Markup] = []
    for bits in error_bits(results.layers):
        drawing = layer_figure(results.layers, bits)
        if drawing is None:
            continue
        name = f"errors-{len(parts)}"
        svg = to_svg(drawing, name, f"Relative error of every layer at {number_format.slice_name(bits)}")
        checked = None if parts else ""
        parts.append(
            join(
                [
                    element("input", type="radio", name="errors", id=name, checked=checked),
                    element("label", number_format.slice_name(bits), for_=name),
                    element("div", Markup(svg), class_="panel"),
                ]
            )
        )
    if not parts:
        return Markup()
    note = element("p", _ERROR_NOTE, class_="note")
    return section("Layer errors", element("div", *parts, class_="tabs"), note)


def _again(results: JobResults) -> Markup:
    parts = [element("pre", element("code", results.command), class_="command")] if results.command else []
    if results.config:
        text = yaml.safe_dump(dict(results.config), sort_keys=False, allow_unicode=True, width=100)
        parts.append(element("details", element("summary", "Configuration"), element("pre", element("code", text))))
    return section("Run it again", *parts) if parts else Markup()


def _origin(results: JobResults) -> Markup:
    models = results.parent.models
    named = {f"model of {bits} bits": model for bits, model in models.items()} or {"parent": results.parent}
    facts = []
    for name, model in named.items():
        if model.path:
            facts.append((name, f"{model.path}{' (reused)' if model.reused else ''}"))
        if model.sha256:
            facts.append((f"{name}, SHA-256", model.sha256))
    facts += [(f"seconds, {name}", number_format.significant(value)) for name, value in results.seconds.items()]
    facts += [(name, str(version)) for name, version in results.versions.items()]
    if not facts:
        return Markup()
    return section("Provenance", table(["fact", "value"], facts, text_columns=2, class_="facts"))
