"""``summary.html``: a sweep's methods side by side, and all of its jobs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from matquant.report import formatting
from matquant.report.html import FILE_NAME as REPORT_NAME
from matquant.report.markup import Markup, element, figure, page, section, table
from matquant.report.results import ALLOCATION, is_number, slice_position
from matquant.report.sweep import DONE, Job, Line, dataset_names, lines, varying_overrides

_MEASURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kl": ("KL to full precision (nats per token)", formatting.significant),
    "perplexity": ("Perplexity", formatting.perplexity),
}
_CAPTIONS = {
    "kl_bits": "KL(full precision ‖ slice), mean over tokens. Lower is better.",
    "perplexity_bits": "Perplexity. Lower is better; dashed: full precision.",
    "kl_ratio": "KL over the lowest KL that any line has at that width: 1 is the best, 2 is twice as far.",
    "kl_bytes": "KL against what a runtime reads for the quantized layers, scales included.",
}


def render_summary(jobs: Sequence[Job], name: str) -> str:
    """The page over ``jobs`` of the sweep called ``name``."""
    compared = lines(jobs)
    models = list(dict.fromkeys(job.model for job in jobs if job.model))
    done = sum(job.status == DONE for job in jobs)
    facts = [f"{done} of {len(jobs)} jobs done", *([", ".join(models)] if len(models) <= 4 else [])]
    header = [element("h1", "Sweep ", element("small", name)), element("p", " · ".join(facts), class_="sub")]
    parts = [element("header", *header)]
    for index, dataset in enumerate(dataset_names(jobs)):
        parts += _dataset(compared, dataset, f"d{index}")
    return page(f"Sweep {name}", *parts, _jobs(jobs))


def _dataset(compared: Sequence[Line], dataset: str, prefix: str) -> list[Markup]:
    compared = [line for line in compared if any(dataset in (e.get(m) or {}) for e in line.slices for m in _MEASURES)]
    figures = _figures(compared, dataset, prefix)
    tables = [_comparison(compared, dataset, measure) for measure in _MEASURES]
    note = element("p", "The best of a column is bold.", class_="note") if len(compared) > 1 else Markup()
    plots = element("div", *figures, class_="figures spaced") if figures else Markup()
    return [section(f"On {dataset}", *tables, note, plots)]


def _comparison(compared: Sequence[Line], dataset: str, measure: str) -> Markup:
    """A row per line, a column per width, the least figure of each column in bold."""
    title, show = _MEASURES[measure]
    found = {_column(entry): entry for line in compared for entry in line.slices}
    widths = sorted(found, key=lambda column: (found[column]["bits"] == ALLOCATION, slice_position(found[column])))
    values: list[dict[str, Any]] = [
        {_column(e): (e.get(measure) or {}).get(dataset) for e in line.slices} for line in compared
    ]
    numbers: dict[str, list[float]] = {b: [v[b] for v in values if is_number(v.get(b))] for b in widths}
    best = {b: min(several) for b, several in numbers.items() if len(several) > 1}
    rows: list[list[str]] = []
    for line, row in zip(compared, values, strict=True):
        cells = [_cell(show(row.get(b)), b in best and row.get(b) == best[b]) for b in widths]
        full = [show((line.baseline.get(measure) or {}).get(dataset))] if measure == "perplexity" else []
        rows.append([line.name, *full, *cells])
    header = ["method", *(["full precision"] if measure == "perplexity" else []), *widths]
    return element("div", element("h3", title), table(header, rows))


def _column(entry: Mapping[str, Any]) -> str:
    """A width, or of an allocation its average; allocations of one budget stand in one column."""
    if entry["bits"] != ALLOCATION or not is_number(entry.get("average_bits")):
        return formatting.width(entry["bits"])
    return f"{entry['average_bits']:.2f} on average"


def _cell(text: str, best: bool) -> str:
    return element("strong", text, class_="best") if best else text


def _figures(compared: Sequence[Line], dataset: str, prefix: str) -> list[Markup]:
    from matquant.report.drawing import to_svg
    from matquant.report.plots import Series, kl_figure, perplexity_figure, ratio_figure, series

    def drawn(x: str, measure: str) -> list[Series]:
        full = [(line.baseline.get("perplexity") or {}).get(dataset) for line in compared]
        return [series(c.name, c.slices, x, measure, dataset, f) for c, f in zip(compared, full, strict=True)]

    figures = {
        "kl_bits": kl_figure(drawn("bits", "kl"), "bits"),
        "perplexity_bits": perplexity_figure(drawn("bits", "perplexity")),
        "kl_ratio": ratio_figure(drawn("bits", "kl")),
        "kl_bytes": kl_figure(drawn("bytes", "kl"), "bytes"),
    }
    return [
        figure(to_svg(drawing, f"{prefix}-{name}", _CAPTIONS[name]), _CAPTIONS[name])
        for name, drawing in figures.items()
        if drawing is not None
    ]


def _jobs(jobs: Sequence[Job]) -> Markup:
    rows = [_job_row(job, given) for job, given in zip(jobs, varying_overrides(jobs), strict=True)]
    header = ["job", "status", "method", "overrides", "widths", "quantizing", "stored models"]
    shared = [o for o in (jobs[0].overrides if jobs else ()) if all(o in job.overrides for job in jobs)]
    note = f"All jobs have {' '.join(shared)}." if shared and len(jobs) > 1 else ""
    parts = [table(header, rows, text_columns=5, class_="jobs")]
    return section("Jobs", *parts, *([element("p", note, class_="note")] if note else []))


def _job_row(job: Job, overrides: Sequence[str]) -> list[str]:
    if job.results is None:
        status: str = element("span", job.status, class_="failed")
        return [job.name, status, job.method, f"{' '.join(overrides)} {job.error or ''}".strip(), "", "", ""]
    models = job.results["parent"].get("models") or {"": job.results["parent"]}
    reused = sum(bool(model.get("reused")) for model in models.values())
    stored = "reused" if reused == len(models) else f"{reused} of {len(models)} reused" if reused else "new"
    widths = ", ".join(str(entry["bits"]) for entry in job.results["slices"])
    took = formatting.MISSING if stored == "reused" else formatting.seconds(job.results["seconds"].get("quantize"))
    return [_linked(job), job.status, job.method, " ".join(overrides), widths, took, stored]


def _linked(job: Job) -> str:
    if not (job.folder / REPORT_NAME).is_file():
        return job.name
    return element("a", job.name, href=f"{quote(job.name)}/{REPORT_NAME}")
