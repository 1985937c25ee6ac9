"""Groups of a row against plain loops, and short last groups in stored descriptions."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import make_weight

from matquant.errors import UserError
from matquant.formats.groups import expand_groups, fit_group_size, group_count, group_index, scale_groups
from matquant.formats.packed import LayerSpec, NestedSpec, parse_nested_config
from matquant.formats.parent import read_block, write_block
from matquant.store.tensor_files import read_tensors, serialize_tensors

COLUMNS = st.one_of(st.sampled_from((30, 72, 200, 576)), st.integers(1, 300))


@settings(max_examples=100, deadline=None)
@given(columns=COLUMNS, data=st.data(), shared=st.booleans())
def test_groups_are_those_of_a_loop_over_the_columns(columns, data, shared):
    size = data.draw(st.integers(1, columns))
    groups = [column // size for column in range(columns)]
    assert group_count(columns, size) == groups[-1] + 1
    assert group_index(columns, size).tolist() == groups
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(3, columns, generator=generator)
    scales, zero_points = torch.randn(2, 3, groups[-1] + 1, generator=generator)
    assert torch.equal(expand_groups(scales, columns, size), torch.stack([scales[:, g] for g in groups], 1))
    zeros = torch.full_like(scales, 8.5) if shared else zero_points
    expected = torch.stack([(values[:, j] - zeros[:, g]) * scales[:, g] for j, g in enumerate(groups)], 1)
    assert torch.equal(scale_groups(values.clone(), scales, 8.5 if shared else zero_points, size), expected)


@pytest.mark.parametrize(
    ("setting", "columns", "size"), [(128, 72, 72), (128, 200, 128), (-1, 200, 200), (32, 30, 30), (64, 64, 64)]
)
def test_a_setting_gives_a_group_size_within_the_row(setting, columns, size):
    assert fit_group_size(setting, columns) == size


SHORT = {"a": make_weight(3, 200, 128), "b": make_weight(70, 72, 64, zeros=True), "c": make_weight(2, 72, 72)}
EQUAL = {"a": make_weight(3, 256, 128), "c": make_weight(2, 72, 72)}


def nested_config(**weights: Any) -> dict[str, Any]:
    layers = {name: LayerSpec.from_weight(weight) for name, weight in weights.items()}
    return NestedSpec(layers=layers, bits=4, max_bits=8).to_json()


def test_a_packed_description_keeps_short_groups():
    layers = parse_nested_config(nested_config(**SHORT)).layers
    assert {name: layer.format.group_size for name, layer in layers.items()} == {"a": 128, "b": 64, "c": 72}
    assert {name: layer.has_equal_groups for name, layer in layers.items()} == {"a": False, "b": False, "c": True}
    assert layers["a"].tensors("a", 2)["a.scales"].shape == (2, 1, 8, 4, 2)


@pytest.mark.parametrize(("size", "found"), [(201, "201"), (0, "0"), (128.0, "128.0"), (-2, "-2")])
def test_a_packed_group_size_beyond_the_row_is_refused(size, found):
    config = nested_config(a=SHORT["a"])
    with pytest.raises(UserError, match=rf"group_size must be .*found {found}"):
        parse_nested_config(config | {"group_size": size})


@pytest.mark.parametrize(("weights", "named"), [(SHORT, {"a": 128, "b": 64}), (EQUAL, {})])
def test_a_block_of_a_parent_names_its_group_size_where_its_shapes_do_not_show_it(tmp_path, weights, named):
    """Files of parents without short groups keep their bytes."""
    record = {"layers": {n: {"shape": list(w.codes.shape), "errors": {}} for n, w in weights.items()}, "notes": []}
    draft: Any = SimpleNamespace(
        write_tensors=lambda name, *content: (tmp_path / name).write_bytes(b"".join(serialize_tensors(*content))),
        read_tensors=lambda name: read_tensors(tmp_path / name),
    )
    write_block(draft, "block", weights, record)
    header = json.loads(draft.read_tensors("block")[1]["matquant"])["layers"]
    assert {name: about["group_size"] for name, about in header.items() if "group_size" in about} == named
    found, _ = read_block(draft, "block")
    assert {name: weight.format for name, weight in found.items()} == {n: w.format for n, w in weights.items()}
