"""The documentation: its site builds, its links and commands hold, and every setting is described."""

import dataclasses
import importlib.util
import itertools
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from shared import ROOT

from matquant import cli
from matquant.config import from_hydra
from matquant.config_check import check_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"FOLDER": "experiments/models/tiny", "FILE.gguf": "model.gguf", "FILE": "text.txt"}


def commands() -> list[tuple[str, str]]:
    """Page and command line of every job in a code block."""
    found = []
    for page in PAGES:
        for line in page.read_text().splitlines():
            command = line.split("  #")[0].split(" # ")[0].strip()
            if line.startswith("    ") and re.match(
                r"(\S*python|torchrun .*) run\.py|matquant (quantize|evaluate|pack)\b", command
            ):
                found.append((page.name, command))
    return found


def hooks():
    """Module ``docs/hooks.py``."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_have_commands():
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_composes(page, command, monkeypatch):
    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(rf"\b{re.escape(placeholder)}\b", value, command)
    words = shlex.split(command.partition("run.py")[2] if "run.py" in command else command.removeprefix("matquant "))
    multirun = "-m" in words
    overrides = cli._translate([word for word in words if word != "-m"])
    overrides = [word for word in overrides if not word.startswith(("hydra", "--"))]
    if multirun:  # the first job of the sweep
        overrides = [re.sub(r"=([^\[{(]*?),.*", r"=\1", word) for word in overrides]
    if any("=allocation.yaml" in word for word in overrides):
        overrides = [word for word in overrides if "allocation.yaml" not in word]
    monkeypatch.chdir(ROOT)
    cli.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_hydra(compose("config", overrides))
    if config.store.action is None and not {"eval.tasks=[mine]"} & set(overrides):
        check_config(config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_code_begin_with_their_first_line(page):
    """In Markdown an indented line does not begin a block of code right after a paragraph."""
    fenced = False
    for before, line in itertools.pairwise(page.read_text().splitlines()):
        fenced ^= before.startswith("```")
        in_list = re.match(r"\s*([-*]|\d+\.) |  ", before)
        assert fenced or in_list or not before.strip() or not re.match(r"    \S", line), f"{before}\n{line}"


def test_links_of_the_pages_reach_files():
    for page in documents():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" in target or target.startswith("reference/"):
                continue
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def documents():
    """Pages, and the pages beside the code and the results."""
    return [*PAGES, *(ROOT / "experiments").rglob("*.md"), ROOT / "kernels" / "README.md"]


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_the_pages_exist(page):
    named = re.findall(r"`((?:\.github|conf|docs|experiments|kernels|matquant|tests)/[\w./-]+)`", page.read_text())
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_every_method_has_a_table_of_settings_with_its_presets():
    titles = " ".join(title for title in hooks().GROUPS if title.startswith("method"))
    presets = re.findall(r"[\w]+", titles.replace("method (", ""))
    assert sorted(presets) == sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))


def test_every_setting_is_described():
    module = hooks()
    for kind in module.GROUPS.values():
        meanings = {}
        for base in kind.__mro__:
            meanings |= module.attribute_meanings(base.__doc__ or "")
        missing = [field.name for field in dataclasses.fields(kind) if not meanings.get(field.name)]
        assert not missing, f"{kind.__name__}: {missing}"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    page = (tmp_path / "site" / "reference" / "settings" / "index.html").read_text()
    assert "method.stretch" in page
