"""``report.html``, one job on one page: the table, the plots and everything needed to run it again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from matquant.report import formatting
from matquant.report.markup import Markup, element, figure, join, page, section, table
from matquant.report.output_files import write_atomic
from matquant.report.results import (
    ALLOCATION,
    Results,
    datasets,
    is_number,
    normalized,
    parents,
    slice_position,
    task_errors,
    task_scores,
)

FILE_NAME = "report.html"

_CAPTIONS = {
    "kl_bits": "How far each slice's predictions are from full precision: KL(full precision ‖ slice), mean over "
    "tokens. Lower is better.",
    "perplexity_bits": "Perplexity of each slice. Lower is better; the dashed line is the full-precision model.",
    "kl_bytes": "The same KL against what a runtime reads for the quantized layers, scales included.",
}
_UNITS = "MB (10⁶ bytes): what a runtime reads for the quantized layers, scales included. KL: nats per token."
_ERROR_NOTE = (
    "Error of each layer's output on the calibration text, relative to that output: "
    "tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ). Each width has its own colours; point at a cell to read it."
)
_TASKS_NOTE = (
    "± is one standard error; in brackets the share of full precision that is kept (a perplexity counts inversely)."
)
_GENERATIONS = (
    "The fittest allocation after each generation. Each point is measured on tokens drawn anew, so it may rise."
)
_MAPS = 6  # maps of widths on one page
_NARROW = 5  # columns of a table that leaves room for a plot beside it


def write_report(results: Results, folder: Path) -> Path:
    """Write ``folder/report.html`` and return its path. It opens without a network; same results give the same bytes.

    Raises:
        ResultsError: the results do not have the schema.
    """
    return write_atomic(Path(folder) / FILE_NAME, render(results))


def render(results: Results) -> str:
    """The page that `write_report` writes."""
    results = normalized(results)
    return page(
        f"{results['model']} {results['method']}",
        _header(results),
        *_slices_and_plots(results),
        _tasks(results),
        _search(results),
        _layers(results),
        _again(results),
        _origin(results),
    )


def _header(results: dict[str, Any]) -> Markup:
    heading = element("h1", results["model"], " ", element("small", results["method"]))
    widths = ", ".join(str(entry["bits"]) for entry in results["slices"] if entry["bits"] != ALLOCATION)
    facts = [f"{widths} bits" if widths else "no slice measured"]
    facts += [f"measured on {', '.join(datasets(results))}"] if datasets(results) else []
    facts += [formatting.moment(results["created"])] if results["created"] else []
    tiles = [element("div", element("dt", name), element("dd", value)) for name, value in _tiles(results)]
    return element(
        "header", heading, element("p", " · ".join(facts), class_="sub"), element("dl", *tiles, class_="tiles")
    )


def _tiles(results: dict[str, Any]) -> list[tuple[str, str]]:
    models = parents(results)
    total = sum(m["bytes"] for m in models if is_number(m.get("bytes")))
    reused = bool(models) and all(m.get("reused") for m in models)
    tiles = (
        [("parent" if len(models) < 2 else f"{len(models)} models together", formatting.size(total))] if total else []
    )
    took = results["seconds"].get("quantize")
    tiles += (
        [("quantizing", "reused")] if reused else [("quantizing", formatting.seconds(took))] if is_number(took) else []
    )
    for name in datasets(results)[:1]:
        full = results["baseline"].get("perplexity", {}).get(name)
        tiles += [("perplexity, full precision", formatting.perplexity(full))] if is_number(full) else []
        for entry in sorted(results["slices"], key=slice_position)[:1]:
            label = formatting.width(entry["bits"])
            tiles += [
                (f"perplexity, {label}", formatting.perplexity(entry.get("perplexity", {}).get(name))),
                (f"KL, {label}", formatting.significant(entry.get("kl", {}).get(name))),
            ]
    return tiles


def _slices_and_plots(results: dict[str, Any]) -> list[Markup]:
    """The table with the first plot beside it if it is narrow, warnings right below, the other plots after them."""
    slices, columns = _slices(results)
    plots = _plots(results)
    lead = plots[:1] if columns <= _NARROW else []
    rest = plots[len(lead) :]
    cost = element("p", f"{formatting.cost(results, parents(results))} {_UNITS}", class_="note")
    parts = [section("Slices", element("div", element("div", slices, cost), *lead, class_="lead"))]
    parts.append(_warnings(results["warnings"]))
    if rest:
        parts.append(section("Quality", element("div", *rest, class_="figures")))
    return parts


def _slices(results: dict[str, Any]) -> tuple[Markup, int]:
    """The table, and its number of columns."""
    names = datasets(results)
    of = (lambda name: f" {name}") if len(names) > 1 else (lambda name: "")
    header = ["bits", "average bits", "MB"]
    header += [f"perplexity{of(name)}" for name in names] + [f"KL{of(name)}" for name in names]
    entries = [{"bits": "full precision"} | results["baseline"], *results["slices"]]
    return table(header, [_slice_row(entry, names) for entry in entries]), len(header)


def _slice_row(entry: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    row = [
        str(entry["bits"]),
        formatting.average_bits(entry.get("average_bits")),
        formatting.megabytes(entry.get("bytes")),
    ]
    row += [formatting.perplexity(entry.get("perplexity", {}).get(name)) for name in names]
    return row + [formatting.significant(entry.get("kl", {}).get(name)) for name in names]


def _warnings(warnings: Sequence[str]) -> Markup:
    if not warnings:
        return Markup()
    title = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    items = element("ul", *(element("li", str(warning)) for warning in warnings))
    return element("div", element("strong", title), items, class_="warnings", role="note")


def _plots(results: dict[str, Any]) -> list[Markup]:
    from matquant.report.drawing import to_svg
    from matquant.report.plots import job_figures

    drawings = job_figures(results)
    return [figure(to_svg(d, name, _CAPTIONS[name]), _CAPTIONS[name]) for name, d in drawings.items()]


def _tasks(results: dict[str, Any]) -> Markup:
    """Every task with its standard errors and the share of full precision that is kept."""
    entries = [{"bits": "full precision"} | results["baseline"], *results["slices"]]
    names = list(dict.fromkeys(name for entry in entries for name in task_scores(entry)))
    if not names:
        return Markup()
    rows = []
    for name in names:
        cells = []
        for entry in entries:
            value, error = task_scores(entry).get(name), task_errors(entry).get(name)
            kept = (entry.get("recovery") or {}).get(name)
            text = formatting.score(value) + (f" ± {formatting.significant(error, 2)}" if is_number(error) else "")
            cells.append(text + (f" ({kept:.1f} %)" if is_number(kept) else ""))
        rows.append([name, *cells])
    header = ["task", *(str(entry.get("name") or formatting.width(entry["bits"])) for entry in entries)]
    return section("Tasks", table(header, rows), element("p", _TASKS_NOTE, class_="note"))


def _search(results: dict[str, Any]) -> Markup:
    """The allocations, the search's generations, and a map of the widths of each (of the first few)."""
    from matquant.report.allocation_plots import allocations, front_rows, generations_figure, widths_figure
    from matquant.report.drawing import to_svg

    found, search = allocations(results), results.get("search") or {}
    if not found:
        return Markup()
    header = ["allocation", "average bits", "MB", "predicted loss", "measured loss"]
    parts = [table(header, front_rows(results))]
    if search:
        parts.append(element("p", _search_words(search), class_="note"))
    drawing = generations_figure(search)
    if drawing is not None:
        curves = figure(to_svg(drawing, "generations", _GENERATIONS), _GENERATIONS)
        parts.append(element("div", curves, class_="figures spaced half"))
    for index, entry in enumerate(found[:_MAPS]):
        drawing = widths_figure(entry, results["layers"])
        if drawing is not None:
            average = formatting.average_bits(entry["average_bits"])
            caption = f"Width of each layer, {entry.get('name', 'allocation')}: {average} bits on average."
            parts.append(figure(to_svg(drawing, f"widths-{index}", caption), caption, class_="map"))
    return section("Allocations", *parts)


def _search_words(search: Mapping[str, Any]) -> str:
    words = f"{search['method']}: {search['evaluations']:,} evaluations on {search['tokens']:,} tokens together"
    words += f", {search['skipped']:,} proposals skipped by the surrogate" if search.get("skipped") else ""
    rate = search.get("evaluations_per_second")
    words += f"; {formatting.significant(rate)} evaluations a second" if is_number(rate) else ""
    return f"{words}. Losses are {search['fitness']} on the search's text."


def _layers(results: dict[str, Any]) -> Markup:
    """A heat map per width; radio buttons choose the one that shows, the lowest width at first."""
    from matquant.report.drawing import to_svg
    from matquant.report.heatmap import layer_figure, layer_widths

    parts: list[Markup] = []
    for bits in layer_widths(results["layers"]):
        drawing = layer_figure(results["layers"], bits)
        if drawing is None:
            continue
        name = f"width-{len(parts)}"
        svg = to_svg(drawing, name, f"Relative error of every layer at {formatting.width(bits)}")
        checked = None if parts else ""
        parts.append(
            join(
                [
                    element("input", type="radio", name="width", id=name, checked=checked),
                    element("label", formatting.width(bits), for_=name),
                    element("div", Markup(svg), class_="panel"),
                ]
            )
        )
    if not parts:
        return Markup()
    note = element("p", _ERROR_NOTE, class_="note")
    return section("Layer errors", element("div", *parts, class_="tabs"), note)


def _again(results: dict[str, Any]) -> Markup:
    parts = [element("pre", element("code", results["command"]), class_="command")] if results["command"] else []
    if results["config"]:
        text = yaml.safe_dump(results["config"], sort_keys=False, allow_unicode=True, width=100)
        parts.append(element("details", element("summary", "Configuration"), element("pre", element("code", text))))
    return section("Run it again", *parts) if parts else Markup()


def _origin(results: dict[str, Any]) -> Markup:
    models = results["parent"].get("models") or {}
    named = {f"model of {bits} bits": model for bits, model in models.items()} or {"parent": results["parent"]}
    facts = []
    for name, model in named.items():
        if model.get("path"):
            facts.append((name, f"{model['path']}{' (reused)' if model.get('reused') else ''}"))
        if model.get("sha256"):
            facts.append((f"{name}, SHA-256", str(model["sha256"])))
    facts += [(f"seconds, {name}", formatting.significant(value)) for name, value in results["seconds"].items()]
    facts += [(name, str(version)) for name, version in results["versions"].items()]
    if not facts:
        return Markup()
    return section("Where it comes from", table(["what", "value"], facts, text_columns=2, class_="facts"))
