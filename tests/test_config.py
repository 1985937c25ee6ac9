"""Every preset composes into the typed config, and the help reads well."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from matquant import cli
from matquant.config import from_hydra
from matquant.config_check import check_config

CONF = Path(__file__).resolve().parents[1] / "conf"
CHOICES = [f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml"))]


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_every_preset_composes(choice, monkeypatch, tmp_path):
    cli.register()
    overrides = [choice]
    if choice == "calibration=local":
        overrides.append(f"calibration.path={tmp_path}")
    if choice == "refine=qat":
        overrides.append("method=matquant_qat")
    if choice.startswith("search=") and choice not in ("search=none", "search=pareto"):
        overrides.append("search.average_bits=3.0")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = from_hydra(compose("config", overrides))
    check_config(config)
    assert config.search.wanted == (choice.startswith("search=") and choice != "search=none")
    assert config.slice_bits == config.objective.bits


def composed(*overrides: str):
    """Typed config of a command line."""
    cli.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["matquant_omniquant", "matquant_qat"])
def test_a_published_method_brings_its_objective_which_the_command_line_replaces(method):
    published = composed(f"method={method}")
    assert (published.objective.name, published.slice_bits) == ("matquant", (2, 3, 4, 6, 8))
    assert {bits: weight for bits, weight in published.objective.lambdas.items() if weight} == {2: 1, 4: 0.1, 8: 0.1}
    assert published.refine.method == ("qat" if method == "matquant_qat" else "none")
    assert composed(f"method={method}", "objective=low_bit").objective.name == "low_bit"
    assert composed("objective=low_bit", f"method={method}").objective.name == "low_bit"
    assert composed(f"method={method}", "calibration.batch_size=2").calibration.batch_size == 2
    assert composed("method=matgptq").objective.name == "balanced"


def test_bits_may_be_one_width_or_a_list():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert from_hydra(compose("config", ["bits=3"])).bits == (3,)
        assert from_hydra(compose("config", ["bits=[2,7]"])).bits == (2, 7)


def test_a_tilt_multiplies_each_weight_by_a_factor_for_every_bit_above_two():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = from_hydra(compose("config", [])).objective
        tilted = from_hydra(compose("config", ["objective.per_bit_factor=1.5"])).objective
    assert plain.lambdas == dict(plain.weights) == dict(tilted.weights)
    assert tilted.lambdas == pytest.approx({b: w * 1.5 ** (b - 2) for b, w in plain.weights.items()})


@pytest.mark.slow
def test_help_names_the_groups_and_the_word_for_word_uses(matquant):
    status, out, _ = matquant("--help")
    assert status == 0
    for text in ("python run.py -m bits=2,3,4,8", "matgptq_v1", "llama3_8b", "objective", "store=ls"):
        assert text in out


def test_the_composed_config_is_printed_and_nothing_runs(matquant, tmp_path):
    status, out, _ = matquant("--cfg", "job")
    assert status == 0
    assert "group_size: 128" in out
    assert not (tmp_path / "run").exists()
