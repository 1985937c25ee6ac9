"""The files of allocations: what is written reads back, and what is wrong is named."""

import pytest

from matquant.errors import UserError
from matquant.formats.allocation import Allocation, check, is_file_name, read, to_text, to_yaml

WIDTHS = {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.down_proj": 8}


def test_yaml_reads_back(tmp_path):
    about = {"method": "hybrid", "budget": {"average_bits": 3.0}, "predicted": None, "measured": {"kl": 0.25}}
    allocation = Allocation(widths=WIDTHS, average_bits=2.9, bytes=1234, about=about)
    path = tmp_path / "a.yaml"
    path.write_text(to_yaml(allocation))
    assert read(path) == allocation
    assert list(read(path).widths) == list(WIDTHS)
    assert "  model.layers.0.mlp.down_proj: 8\n" in path.read_text()


def test_only_widths_are_needed(tmp_path):
    (tmp_path / "a.yml").write_text("widths: {a: 3, b: 4}\n")
    assert read(tmp_path / "a.yml") == Allocation(widths={"a": 3, "b": 4})


def test_the_published_text_format_reads_back(tmp_path):
    text = "model.layers.0.self_attn.q_proj: 2\nmodel.layers.0.mlp.down_proj: 8\n"
    assert to_text(Allocation(widths=WIDTHS)) == text
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt").widths == WIDTHS
    (tmp_path / "b.txt").write_text("\n# from elsewhere\na.b:3.0\n  c : 4")  # no newline at the end, as published
    assert read(tmp_path / "b.txt").widths == {"a.b": 3, "c": 4}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.yaml", "widths: {a: 9}", "a needs a width of 2..8 bits; found 9"),
        ("a.yaml", "widths: {a: 2.5}", "a needs a width of 2..8 bits; found 2.5"),
        ("a.yaml", "widths: {a: true}", "a needs a width of 2..8 bits; found True"),
        ("a.yaml", "widths: {}", "has no mapping 'widths'"),
        ("a.yaml", "- a", "has no mapping 'widths'"),
        ("a.yaml", "when: 2026-11-24\nwidths: {a: 2}", "holds what results cannot"),
        ("a.yaml", "widths: [", "is no YAML"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "is no YAML"),
        ("a.txt", "a: 3\nb", "line 2: expected 'layer: bits'; found 'b'"),
        ("a.txt", "a: three", "a needs a width of 2..8 bits; found 'three'"),
        ("a.txt", "a: 3\na: 4", "line 2: a has a width already"),
        ("a.txt", "\n", "is empty"),
        ("a.json", "{}", "ends with .yaml, .yml, .txt"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert sentence in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="There is no allocation at"):
        read(tmp_path / "a.yaml")


def test_layers_must_be_those_of_the_parent():
    check(Allocation(widths={"a": 2, "b": 8}), ["a", "b"], 8, "x.yaml")
    with pytest.raises(UserError, match=r"x.yaml names layers that this parent does not have: c, d, e and 1 more"):
        check(Allocation(widths=dict.fromkeys("abcdef", 2)), ["a", "b"], 8, "x.yaml")
    with pytest.raises(UserError, match=r"x.yaml gives no width to b; every quantized layer needs one"):
        check(Allocation(widths={"a": 2}), ["a", "b"], 8, "x.yaml")
    with pytest.raises(UserError, match=r"b has 8 bits, but the parent has only 6"):
        check(Allocation(widths={"a": 2, "b": 8}), ["a", "b"], 6, "x.yaml")


def test_which_values_of_bits_are_files():
    assert is_file_name("runs/a.YAML")
    assert is_file_name("a.txt")
    assert not any(is_file_name(value) for value in ("4", "four", 4, None))
