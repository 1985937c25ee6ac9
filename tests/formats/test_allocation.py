"""Files of allocations: written files read back, and errors name what is wrong."""

import pytest

from matquant.errors import UserError
from matquant.formats.allocation import Allocation, check_layers, is_file_name, read, to_text, to_yaml

BITS = {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.down_proj": 8}


def test_yaml_round_trip(tmp_path):
    about = {"method": "hybrid", "budget": {"average_bits": 3.0}, "predicted": None, "measured": {"kl": 0.25}}
    allocation = Allocation(bits=BITS, average_bits=2.9, bytes=1234, about=about)
    path = tmp_path / "a.yaml"
    path.write_text(to_yaml(allocation))
    assert read(path) == allocation
    assert list(read(path).bits) == list(BITS)
    assert "\nbits:\n  model.layers.0.self_attn.q_proj: 2\n  model.layers.0.mlp.down_proj: 8\n" in path.read_text()


def test_only_the_bits_are_required(tmp_path):
    (tmp_path / "a.yml").write_text("bits: {a: 3, b: 4}\n")
    assert read(tmp_path / "a.yml") == Allocation(bits={"a": 3, "b": 4})


def test_file_of_an_older_version(tmp_path):
    """The key of the mapping was ``widths``."""
    (tmp_path / "a.yaml").write_text(
        """# A width for each layer. Edit them as you like; `python run.py bits=THIS_FILE` measures what stands here.
kind: allocation
method: hybrid
budget:
  average_bits: 3.0
fused: false
seed: 0
fitness: kl
measured: 0.06585934942027476
predicted: 0.06790989435305284
predicted_from: shared
parent: c867e93aaafbdea7f894f9918cdaae9213145e4defb4010c868b126d21fdde8e
average_bits: 3.0
bytes: 1843200
widths:
  model.layers.0.mlp.down_proj: 3
  model.layers.0.self_attn.v_proj: 4
"""
    )
    found = read(tmp_path / "a.yaml")
    assert found.bits == {"model.layers.0.mlp.down_proj": 3, "model.layers.0.self_attn.v_proj": 4}
    assert (found.average_bits, found.bytes) == (3.0, 1843200)
    assert found.about == {
        "method": "hybrid",
        "budget": {"average_bits": 3.0},
        "fused": False,
        "seed": 0,
        "fitness": "kl",
        "measured": 0.06585934942027476,
        "predicted": 0.06790989435305284,
        "predicted_from": "shared",
        "parent": "c867e93aaafbdea7f894f9918cdaae9213145e4defb4010c868b126d21fdde8e",
    }


def test_text_round_trip(tmp_path):
    text = "model.layers.0.self_attn.q_proj: 2\nmodel.layers.0.mlp.down_proj: 8\n"
    assert to_text(Allocation(bits=BITS)) == text
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt").bits == BITS
    (tmp_path / "b.txt").write_text("\n# from elsewhere\na.b:3.0\n  c : 4")  # no final newline, like published files
    assert read(tmp_path / "b.txt").bits == {"a.b": 3, "c": 4}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "bits: {a: 9}", "a needs a bit-width of 2..8 bits; found 9"),
        ("a.yaml", "bits: {a: 2.5}", "a needs a bit-width of 2..8 bits; found 2.5"),
        ("a.yaml", "bits: {a: true}", "a needs a bit-width of 2..8 bits; found True"),
        ("a.yaml", "bits: {}", "has no mapping 'bits'"),
        ("a.yaml", "widths: 3", "has no mapping 'bits'"),
        ("a.yaml", "- a", "has no mapping 'bits'"),
        ("a.yaml", "bits: {a: 2}\nwidths: {a: 3}", "has both 'bits' and 'widths'"),
        ("a.yaml", "when: 2026-11-24\nbits: {a: 2}", "an entry that results.json cannot hold"),
        ("a.yaml", "bits: [", "is no valid YAML"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "is no valid YAML"),
        ("a.txt", "a: 3\nb", "line 2: expected 'layer: bits'; found 'b'"),
        ("a.txt", "a: three", "a needs a bit-width of 2..8 bits; found 'three'"),
        ("a.txt", "a: 3\na: 4", "line 2: a has a bit-width already"),
        ("a.txt", "\n", "is empty"),
        ("a.json", "{}", "must end with .yaml, .yml, .txt"),
    ],
)
def test_invalid_file_raises(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert message in str(error.value)


def test_missing_file_raises(tmp_path):
    with pytest.raises(UserError, match="There is no allocation at"):
        read(tmp_path / "a.yaml")


def test_layers_of_another_parent_raise():
    check_layers(Allocation(bits={"a": 2, "b": 8}), ["a", "b"], 8, "x.yaml")
    with pytest.raises(UserError, match=r"x.yaml names 4 layers that this parent does not have: c, d, e and 1 more"):
        check_layers(Allocation(bits=dict.fromkeys("abcdef", 2)), ["a", "b"], 8, "x.yaml")
    with pytest.raises(UserError, match=r"x.yaml has no bit-width for b\. "):
        check_layers(Allocation(bits={"a": 2}), ["a", "b"], 8, "x.yaml")
    with pytest.raises(UserError, match=r"b has 8 bits, but the parent has only 6"):
        check_layers(Allocation(bits={"a": 2, "b": 8}), ["a", "b"], 6, "x.yaml")


def test_is_file_name():
    assert is_file_name("runs/a.YAML")
    assert is_file_name("a.txt")
    assert not any(is_file_name(value) for value in ("4", "four", 4, None))
