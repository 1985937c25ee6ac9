"""Changes of the one-shot solver on real models: their settings, their records, and jobs that fail."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from shared import ROOT, load_script

from matquant import cli
from matquant.config import from_hydra
from matquant.config_check import check_config

pytestmark = pytest.mark.slow

FOLDER = ROOT / "experiments" / "benchmarks" / "real"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    made = load_script(FOLDER / "ablation.py")
    monkeypatch.setattr(made, "open_reference", lambda *_: (None, None, None))
    monkeypatch.setattr(made, "texts_of", lambda _: {"source": None})
    return made


def test_every_change_is_a_valid_configuration_of_its_own(script: Any) -> None:
    cli.register()
    found = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for change, settings in script.CHANGES.items():
            config = from_hydra(compose("config", ["method.group_size=64", "tracking=none", *settings]))
            check_config(config)
            found[change] = config
    assert len({repr(config) for config in found.values()}) == len(script.CHANGES)


def test_records_name_the_change_and_a_failed_job_loses_no_others(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def job(model: Path, method: str, seed: int, group_size: int, texts: list[str], overrides: list[str]) -> Any:
        if "method.stretch=1" in overrides:
            raise RuntimeError("no memory")
        return {
            "seconds": {"quantize": 2.0},
            "slices": [{"bits": 2, "kl": {"stdlib": 1.5}, "perplexity": {"stdlib": 9.0}}],
        }

    monkeypatch.setattr(script, "run_job", job)
    changes = ["none", "strict planes", "rotation"]
    monkeypatch.setattr("sys.argv", ["ablation.py", "small.gguf", "--changes", *changes, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"strict planes.*no memory"):
        script.main()
    records = json.loads((tmp_path / "ablation" / "small.json").read_text())
    assert sorted((one["change"], one["text"], one["bits"], one["kl"]) for one in records) == [
        ("none", "source", 2, 1.5),
        ("rotation", "source", 2, 1.5),
    ]
