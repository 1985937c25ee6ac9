"""The documentation: its site builds, its links and commands hold, and every setting is described."""

import dataclasses
import itertools
import re
import shlex
import tomllib

import pytest
from hydra import compose, initialize_config_dir
from shared import ROOT, load_script

from matquant import cli, completion
from matquant.config import from_hydra
from matquant.config_check import check_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"NAME": "wikitext2", "FOLDER": "experiments/models/tiny", "FILE.gguf": "model.gguf", "FILE": "text.txt"}


START = re.compile(r"(?:\S*python|torchrun|make|matquant|pip)\s")


def all_commands() -> list[tuple[str, str]]:
    """Page and command line of every command in a block of code or in a line of text."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = [line for line in text.splitlines() if line.startswith("    ")]
        lines = [re.split("  #| # ", line)[0].strip() for line in blocks]
        lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
        for line in lines:
            line = re.sub(r"source <\((.*)\)", r"\1", line)
            found += [(page.name, part.strip()) for part in re.split(r" && | \| ", line) if START.match(part.strip())]
    return list(dict.fromkeys(found))


def commands() -> list[tuple[str, str]]:
    """Page and command line of every job."""
    job = re.compile(r"(\S*python|torchrun .*) run\.py|matquant (quantize|evaluate|pack|generate|store)\b")
    return [(page, command) for page, command in all_commands() if job.match(command)]


def other_commands() -> list[tuple[str, str]]:
    jobs = commands()
    return [found for found in all_commands() if found not in jobs]


def hooks(name="hooks"):
    """Module of ``docs``."""
    pytest.importorskip("mkdocs")
    return load_script(ROOT / "docs" / f"{name}.py", f"docs_{name}")


def test_the_pages_have_commands():
    assert len(commands()) > 60
    assert {shlex.split(command)[0] for _, command in other_commands()} >= {"make", "pip", "matquant", "python"}


@pytest.mark.slow
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


def check_script(name, rest):
    """A script, or with -m a module, exists and knows the options."""
    module = name == "-m"
    name, rest = (rest[0], rest[1:]) if module else (name, rest)
    if module and not name.startswith("matquant"):
        return
    path = ROOT / (name.replace(".", "/") + ".py" if module else name)
    assert path.is_file(), name
    text = path.read_text()
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert f'"{option}"' in text, f"{name} has no option {option}"


def check_make(*words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in (word for word in words if "=" not in word):
        assert word in targets, word


def check_pip(_, *words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"(?:matquant|\.)\[(\w+)\]", " ".join(words)):
        assert extra in (*extras, "EXTRA"), extra


def check_matquant(command, *words):
    assert command in (*cli._COMMANDS, *cli._OTHER_COMMANDS), command
    if command == "completion":
        assert completion.command(list(words), None)
    elif words:
        assert cli.server_command(list(words))


@pytest.mark.parametrize(("page", "command"), other_commands())
def test_every_other_command_names_what_exists(page, command):
    program, *words = shlex.split(command)
    checks = {"make": check_make, "pip": check_pip, "matquant": check_matquant}
    if program in checks:
        checks[program](*words)
    elif words[0] != "-c":
        check_script(words[0], words[1:])


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


def test_the_interface_lists_every_function_with_what_it_does():
    page = hooks("api_page").api_page()
    entries = re.split("^### ", page, flags=re.MULTILINE)[1:]
    names = [entry.split("\n")[0] for entry in entries]
    assert {"matquant.inference.NestedLinear", "matquant.quantize.base.BlockQuantizer"} <= set(names)
    for entry in entries:
        _, _, text = entry.partition("```\n\n")
        assert re.match(r"[A-Z]", text), entry[:80]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    for page, words in {"settings": "method.stretch", "api": "Make <code>model.generate</code> speculative"}.items():
        assert words in (tmp_path / "site" / "reference" / page / "index.html").read_text()
    for page, link in {"serving": "load_wave.png", "limits": ""}.items():  # recorded results are pages too
        assert f'="../measured/serving/{link}"' in (tmp_path / "site" / page / "index.html").read_text()
    assert 'src="load_wave.png"' in (tmp_path / "site" / "measured" / "serving" / "index.html").read_text()
    assert (tmp_path / "site" / "measured" / "serving" / "load_wave.png").stat().st_size > 10_000
