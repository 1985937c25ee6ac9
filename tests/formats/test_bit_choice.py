"""Bit-widths of a checkpoint's config, and those that the caller of a loader requests instead."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from weights import make_weight

from matquant.errors import UserError
from matquant.formats.bit_choice import BitChoice, RequestedBits, bits_by_layer, choose_bits
from matquant.formats.packed import LayerSpec, NestedSpec


def make_spec(**changes: Any) -> NestedSpec:
    layer = LayerSpec.from_weight(make_weight(8, 64, 64))
    return NestedSpec(**{"layers": {"a": layer, "b": layer}, "bits": 4, "max_bits": 8} | changes)


def choose(spec: NestedSpec, **requested: Any) -> BitChoice:
    return choose_bits(spec, RequestedBits(**requested))


def decode_bits(choice: BitChoice) -> dict[str, int]:
    return {layer: choice.of(layer)[0] for layer in "ab"}


def test_defaults_of_the_checkpoint():
    choice = choose(make_spec(layer_bits={"b": 3}, prefill_bits=8))
    assert (choice.of("a"), choice.of("b")) == ((4, 8), (3, 8))
    assert choice.max_bits == 8
    assert choice.prefill_differs


def test_one_bit_width_replaces_the_allocation_and_the_prefill_bits():
    choice = choose(make_spec(layer_bits={"b": 3}, prefill_bits=8), bits=2)
    assert choice == BitChoice(bits=2, layer_bits={}, prefill_bits=None, max_bits=8)
    assert choice.of("b") == (2, 2)
    assert not choice.prefill_differs


def test_a_mapping_or_file_amends_the_allocation(tmp_path):
    spec = make_spec(layer_bits={"b": 3})
    assert decode_bits(choose(spec, bits={"a": 7})) == {"a": 7, "b": 3}
    assert decode_bits(choose(spec, layer_bits={"a": 7})) == {"a": 7, "b": 3}
    assert decode_bits(choose(spec, bits=2, layer_bits={"a": 7})) == {"a": 7, "b": 2}
    file = tmp_path / "allocation.yaml"
    file.write_text(json.dumps({"bits": {"a": 5, "b": 6}}))
    for bits in (file, str(file)):
        assert decode_bits(choose(spec, bits=bits)) == {"a": 5, "b": 6}


def test_max_bits_lowers_one_bit_width_but_no_allocation():
    assert choose(make_spec(bits=8), max_bits=3) == BitChoice(bits=3, layer_bits={}, prefill_bits=None, max_bits=3)
    with pytest.raises(UserError, match="bits of b: 6 bits cannot be read"):
        choose(make_spec(layer_bits={"b": 6}), max_bits=3)
    assert decode_bits(choose(make_spec(layer_bits={"b": 6}), max_bits=3, bits=3)) == {"a": 3, "b": 3}


def test_prefill_differs_from_any_layer():
    assert not choose(make_spec(), prefill_bits=4).prefill_differs
    assert choose(make_spec(layer_bits={"b": 3}), prefill_bits=4).prefill_differs


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"bits": 9}, "bits: a bit-width must be a whole number in 2..8; found 9"),
        ({"bits": True}, "bits: a bit-width must be a whole number in 2..8; found True"),
        ({"bits": "four"}, "allocation file; found 'four'"),
        ({"bits": "none.yaml"}, "There is no allocation at none.yaml"),
        ({"bits": 6, "max_bits": 5}, "bits: 6 bits cannot be read; .* at most 5 bits"),
        ({"max_bits": 1}, "max_bits: a bit-width must be a whole number"),
        ({"prefill_bits": "8"}, "prefill_bits: a bit-width must be a whole number in 2..8; found '8'"),
        ({"prefill_bits": 8, "max_bits": 4}, "prefill_bits: 8 bits cannot be read"),
        (
            {"layer_bits": {"c": 4}},
            "1 of 1 layers that are no nested layers of this model: c. The name closest to c is",
        ),
        ({"bits": {"a": 1}}, "bits of a: a bit-width must be a whole number in 2..8; found 1"),
    ],
)
def test_unavailable_bits_raise(requested, message):
    with pytest.raises(UserError, match=message):
        choose(make_spec(), **requested)


def test_request_in_the_attributes_of_a_config():
    config = SimpleNamespace(bits=3, max_bits=None, hidden_size=64)
    assert RequestedBits.from_config(config) == RequestedBits(bits=3)


def test_layers_that_are_not_known_yet():
    assert bits_by_layer(4, {}) == {}
    assert bits_by_layer({"x": 4}, {}) == {"x": 4}
