"""Summary page of a sweep: methods side by side, and all jobs."""

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from matquant import number_format
from matquant.number_format import is_number
from matquant.report.html import FILE_NAME as REPORT_NAME
from matquant.report.markup import Markup, element, figure, page, section, table
from matquant.report.results import SliceResult
from matquant.report.sweep import DONE, FAILED, Curve, SweepJob, curves, dataset_names, varying_overrides

_MEASURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kl": ("KL to full precision (nats per token)", number_format.significant),
    "perplexity": ("Perplexity", number_format.perplexity),
}
_CAPTIONS = {
    "kl_bits": "KL(full precision ‖ slice), mean over tokens. Lower is better.",
    "perplexity_bits": "Perplexity. Lower is better; dashed: full precision.",
    "kl_ratio": "KL relative to the lowest KL of all curves at the same bits: 1 is the best, 2 is twice as far.",
    "kl_bytes": "KL against the bytes of the quantized layers that a runtime reads, scales included.",
}


def render_summary(jobs: Sequence[SweepJob], name: str) -> str:
    """Page over the jobs of the sweep ``name``."""
    compared = curves(jobs)
    models = list(dict.fromkeys(job.model for job in jobs if job.model))
    done = sum(job.status == DONE for job in jobs)
    facts = [f"{done} of {len(jobs)} jobs done", *([", ".join(models)] if len(models) <= 4 else [])]
    header = [element("h1", "Sweep ", element("small", name)), element("p", " · ".join(facts), class_="sub")]
    parts = [element("header", *header)]
    for index, dataset in enumerate(dataset_names(jobs)):
        parts += _dataset(compared, dataset, f"d{index}")
    return page(f"Sweep {name}", *parts, _jobs(jobs))


def _dataset(compared: Sequence[Curve], dataset: str, prefix: str) -> list[Markup]:
    compared = [c for c in compared if any(dataset in getattr(one, m) for one in c.slices for m in _MEASURES)]
    figures = _figures(compared, dataset, prefix)
    tables = [_comparison(compared, dataset, measure) for measure in _MEASURES]
    note = element("p", "Bold: the best of a column.", class_="note") if len(compared) > 1 else Markup()
    plots = element("div", *figures, class_="figures spaced") if figures else Markup()
    return [section(f"On {dataset}", *tables, note, plots)]


def _comparison(compared: Sequence[Curve], dataset: str, measure: str) -> Markup:
    """Table with a row per curve and a column per bit-width; the least figure of each column is bold."""
    title, show = _MEASURES[measure]
    found = {_column(one): one for curve in compared for one in curve.slices}
    columns = sorted(found, key=lambda column: (found[column].is_allocation, found[column].position))
    values: list[dict[str, Any]] = [
        {_column(one): getattr(one, measure).get(dataset) for one in curve.slices} for curve in compared
    ]
    numbers: dict[str, list[float]] = {b: [v[b] for v in values if is_number(v.get(b))] for b in columns}
    best = {b: min(several) for b, several in numbers.items() if len(several) > 1}
    rows: list[list[str]] = []
    for curve, row in zip(compared, values, strict=True):
        cells = [_cell(show(row.get(b)), b in best and row.get(b) == best[b]) for b in columns]
        full = [show(curve.baseline.perplexity.get(dataset))] if measure == "perplexity" else []
        rows.append([curve.name, *full, *cells])
    header = ["method", *(["full precision"] if measure == "perplexity" else []), *columns]
    return element("div", element("h3", title), table(header, rows))


def _column(one: SliceResult) -> str:
    """Column of a slice: its bit-width, or the average of an allocation, so that allocations of one budget share a column."""
    if not one.is_allocation or one.average_bits is None:
        return number_format.slice_name(one.bits)
    return f"{one.average_bits:.2f} on average"


def _cell(text: str, best: bool) -> str:
    return element("strong", text, class_="best") if best else text


def _figures(compared: Sequence[Curve], dataset: str, prefix: str) -> list[Markup]:
    from matquant.report.drawing import to_svg
    from matquant.report.plots import Series, kl_figure, perplexity_figure, ratio_figure, series

    def drawn(x: str, measure: str) -> list[Series]:
        full = [curve.baseline.perplexity.get(dataset) for curve in compared]
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


def _jobs(jobs: Sequence[SweepJob]) -> Markup:
    rows = [_job_row(job, given) for job, given in zip(jobs, varying_overrides(jobs), strict=True)]
    header = ["job", "status", "method", "overrides", "bits", "quantizing", "stored models"]
    shared = [o for o in (jobs[0].overrides if jobs else ()) if all(o in job.overrides for job in jobs)]
    note = f"All jobs have {' '.join(shared)}." if shared and len(jobs) > 1 else ""
    parts = [table(header, rows, text_columns=5, class_="jobs")]
    return section("Jobs", *parts, *([element("p", note, class_="note")] if note else []))


def _job_row(job: SweepJob, overrides: Sequence[str]) -> list[str]:
    if job.results is None or job.status == FAILED:
        status: str = element("span", job.status, class_="failed")
        name = job.name if job.results is None else _linked(job)
        return [name, status, job.method, f"{' '.join(overrides)} {job.error or ''}".strip(), "", "", ""]
    models = job.results.parent.stored
    reused = sum(model.reused for model in models)
    stored = "reused" if reused == len(models) else f"{reused} of {len(models)} reused" if reused else "new"
    bits = ", ".join(str(one.bits) for one in job.results.slices)
    took = number_format.MISSING if stored == "reused" else number_format.seconds(job.results.seconds.get("quantize"))
    return [_linked(job), job.status, job.method, " ".join(overrides), bits, took, stored]


def _linked(job: SweepJob) -> str:
    if not (job.folder / REPORT_NAME).is_file():
        return job.name
    return element("a", job.name, href=f"{quote(job.name)}/{REPORT_NAME}")
