import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from matquant.report import JobResults
from matquant.report.drawing import PALETTE, SERIES, to_png, to_svg
from matquant.report.heatmap import error_bits, layer_figure
from matquant.report.plots import Series, job_figures, kl_figure, perplexity_figure, ratio_figure, series
from matquant.report.results import LayerErrors


def line(name="a", points=((2.0, 1.0), (4.0, 0.1)), **more):
    return Series(name, tuple(points), **more)


def test_a_job_has_three_plots_with_labelled_axes(make_results):
    figures = job_figures(JobResults.from_json(make_results(allocation=True)))
    labels = {name: (f.axes[0].get_xlabel(), f.axes[0].get_ylabel()) for name, f in figures.items()}
    assert labels == {
        "kl_bits": ("bits per weight", "KL to full precision (nats per token)"),
        "perplexity_bits": ("bits per weight", "perplexity"),
        "kl_bytes": ("quantized layers read by a runtime (MB)", "KL to full precision (nats per token)"),
    }
    assert figures["kl_bits"].axes[0].get_yscale() == "log"


def test_nothing_measured_draws_nothing(make_results):
    assert job_figures(JobResults.from_json(make_results(bits=(), layers=[]))) == {}
    assert kl_figure([line(points=((2.0, 0.0), (3.0, -1e-9)))], "bits") is None
    assert layer_figure([], "2") is None


def test_series_takes_figures_apart(make_results):
    results = make_results(allocation=True)
    results["slices"][0]["kl"]["stdlib"] = None
    slices = JobResults.from_json(results).slices
    found = series("x", slices, "bits", "kl", "stdlib")
    assert found.points == ((3.0, 0.25), (4.0, 0.0625))
    assert found.allocations == ((2.5, 0.5),)
    assert series("x", slices, "bytes", "kl", "stdlib").points[0] == (0.375, 0.25)


def test_ratio_needs_a_shared_width():
    assert ratio_figure([line()]) is None
    assert ratio_figure([line(), line("b", ((3.0, 1.0),))]) is None
    figure = ratio_figure([line(), line("b", ((2.0, 3.0),))])
    assert figure is not None
    assert [list(drawn.get_ydata()) for drawn in figure.axes[0].lines if drawn.get_label() in ("a", "b")] == [
        [1, 1],
        [3],
    ]


def test_full_precision_is_written_once_when_shared():
    shared = perplexity_figure([line(full=7.0), line("b", full=7.0)])
    assert [text.get_text() for text in shared.axes[0].texts] == ["full precision 7.000"]
    apart = perplexity_figure([line(full=7.0), line("b", full=8.0)])
    assert not apart.axes[0].texts


def test_many_series_differ_in_colour_marker_or_dashes():
    figure = kl_figure([line(f"s{i}") for i in range(25)], "bits")
    drawn = [d for d in figure.axes[0].lines if d.get_label().startswith("s")]
    looks = {(d.get_color(), d.get_marker(), str(d.get_linestyle()), str(d._dash_pattern)) for d in drawn}
    assert len(drawn) == len(looks) == 25


@pytest.mark.parametrize("name", ["_hidden", "$x^$", "a" * 200, "<b>&amp;", "é ‖ 量"])
def test_any_name_can_be_drawn(name):
    svg = to_svg(kl_figure([line(name), line("b")], "bits"), "x", name)
    root = ElementTree.fromstring(svg)
    texts = ["".join(element.itertext()).strip() for element in root.iter("text")]
    assert any(text and (name.startswith(text.rstrip("…")) or text == name) for text in texts)


def test_svg_is_inline_and_follows_the_page(make_results):
    svg = to_svg(job_figures(JobResults.from_json(make_results()))["kl_bits"], "kl", "what it shows")
    assert svg.startswith('<svg role="img" aria-label="what it shows"')
    assert svg.endswith("</svg>")
    assert "http" not in svg
    assert "xlink" not in svg
    assert "<metadata" not in svg
    assert "width=" not in svg[:200]
    assert "var(--c0)" in svg
    assert "var(--muted)" in svg
    assert SERIES[0] not in svg
    used = set(re.findall(r"#([0-9a-f]{6})\b", svg))
    assert not used & {colour[1:] for colour in PALETTE.values()}
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("kl-") for name in ids)
    assert set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg)) <= set(ids)


def test_drawing_is_deterministic_and_leaves_no_settings(make_results):
    before = dict(matplotlib.rcParams)
    first, second = (to_svg(job_figures(JobResults.from_json(make_results()))["kl_bits"], "kl", "") for _ in range(2))
    assert first == second
    assert to_png(kl_figure([line()], "bits")) == to_png(kl_figure([line()], "bits"))
    assert dict(matplotlib.rcParams) == before


def test_png_is_one(make_results):
    assert to_png(kl_figure([line()], "bits")).startswith(b"\x89PNG")


def test_heat_map_has_a_cell_per_layer_that_says_its_value(make_results):
    layers = [LayerErrors(**layer) for layer in make_results()["layers"]]
    assert error_bits(layers) == ["2", "3", "4"]
    svg = to_svg(layer_figure(layers, "2"), "heat", "")
    titles = re.findall(r"<title>([^<]*)</title>", svg)
    assert len(titles) == 6
    assert "block 1, down: 0.125" in titles
    assert "block 0, q: 0.0625" in titles


def test_heat_map_averages_experts_and_keeps_names_apart():
    names = ["mlp.experts.0.down_proj", "mlp.experts.1.down_proj", "shared.down_proj", "self_attn.q_proj"]
    layers = [
        LayerErrors(name=f"model.layers.3.{name}", block=3, parameters=weight, error={"2": error})
        for name, weight, error in zip(names, (1, 3, 1, 1), (0.4, 0.8, 0.1, 0.2), strict=True)
    ]
    layers.append(LayerErrors(name="lm_head", parameters=1, error={"2": 0.5}))
    titles = re.findall(r"<title>([^<]*)</title>", to_svg(layer_figure(layers, "2"), "h", ""))
    assert titles == ["block 3, mlp experts down: 0.700", "block 3, shared down: 0.100", "block 3, q: 0.200"]


def test_a_single_error_and_zeros_draw():
    layer = LayerErrors(name="model.layers.0.q_proj", block=0, error={"2": 0.5, "8": 0.0})
    assert layer_figure([layer], "2") is not None
    assert layer_figure([layer], "8") is None
