"""Hooks of MkDocs: pages made from the config dataclasses and from recorded results, and links to files of the repository."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

from matquant.config import METHODS, Config, RuntimeConfig
from matquant.data.config import TextConfig
from matquant.evaluate.config import EvalConfig
from matquant.models.config import ModelConfig
from matquant.pack.config import PackConfig
from matquant.quantize.config import ObjectiveConfig
from matquant.refine.config import RefineConfig
from matquant.report.config import TrackingConfig
from matquant.search.config import SearchConfig
from matquant.store.config import StoreConfig
from matquant.transforms.config import TransformConfig

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
PAGE = "reference/settings.md"
RESULTS = REPOSITORY / "experiments" / "results"
_ATTRIBUTE = re.compile(r"^ {4}(\w[\w, ]*): ((?:.|\n)*?)(?=^ {4}\w|\Z)", re.MULTILINE)


def _schema_of(preset: str) -> str:
    """Name in ``METHODS`` of a preset of ``conf/method``, which its defaults name, or those of the preset that it extends."""
    tree = yaml.safe_load((REPOSITORY / "conf" / "method" / f"{preset}.yaml").read_text())
    for entry in tree["defaults"]:
        if isinstance(entry, dict):
            schema = entry.get("/schema@_here_") or entry.get("/schema@method")
            if schema in METHODS:
                return str(schema)
    return _schema_of(next(entry for entry in tree["defaults"] if isinstance(entry, str) and entry != "_self_"))


def _method_groups() -> dict[str, type]:
    """Config of each method by a title with the presets that use it."""
    presets: dict[str, list[str]] = {name: [] for name in METHODS}
    for path in sorted((REPOSITORY / "conf" / "method").glob("*.yaml")):
        presets[_schema_of(path.stem)].append(path.stem)
    return {f"method ({', '.join(presets[name])})": kind for name, kind in METHODS.items()}


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "calibration": TextConfig,
    "objective": ObjectiveConfig,
    **_method_groups(),
    "transform": TransformConfig,
    "refine": RefineConfig,
    "search": SearchConfig,
    "eval": EvalConfig,
    "pack": PackConfig,
    "tracking": TrackingConfig,
    "runtime": RuntimeConfig,
    "store": StoreConfig,
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and their pictures."""
    files.append(File.generated(config, PAGE, content=settings_page()))
    files.append(File.generated(config, "reference/api.md", content=_module(DOCS / "api_page.py").api_page()))
    for readme in sorted(RESULTS.glob("*/README.md")):
        name = readme.parent.name
        files.append(File.generated(config, f"measured/{name}/index.md", content=results_page(readme)))
        for picture in readme.parent.glob("*.png"):
            files.append(File.generated(config, f"measured/{name}/{picture.name}", abs_src_path=str(picture)))
    return files


def results_page(readme: Path) -> str:
    """Page of recorded results, without its links to files beside it, which the site does not have."""

    def replace(link: re.Match[str]) -> str:
        path = (readme.parent / link[2]).resolve().relative_to(REPOSITORY)
        return f"{link[1]} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)([^)#]+)\)", replace, readme.read_text())


def _module(path: Path) -> Any:
    """Module of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files outside of the docs by their paths, which a reader finds in the repository.

    Pictures and pages of recorded results are in the site.
    """
    markdown = re.sub(r"\]\(\.\./experiments/results/([\w/]+\.png)\)", r"](measured/\1)", markdown)
    markdown = re.sub(r"\]\(\.\./experiments/results/(\w+)/README\.md\)", r"](measured/\1/index.md)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)


def settings_page() -> str:
    """Every setting with its default and meaning, as Markdown."""
    parts = ["# Settings\n", "Any of these is an override: `python run.py GROUP.NAME=VALUE`.\n", _table("", Config)]
    for title, kind in GROUPS.items():
        parts.append(f"\n## {title}\n\n{_table(title.split()[0] + '.', kind)}")
    return "\n".join(parts)


def _table(prefix: str, kind: type) -> str:
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        meanings |= attribute_meanings(base.__doc__ or "")
    rows = ["| Setting | Default | Meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type) or (prefix == "" and field.name in {k.split()[0] for k in GROUPS}):
            continue
        rows.append(
            f"| `{prefix}{field.name}` | {_default(field)} | {meanings.get(field.name, '').replace('|', ' or ')} |"
        )
    return "\n".join(rows) + "\n"


def attribute_meanings(docstring: str) -> dict[str, str]:
    """Meaning of each attribute in a docstring's section ``Attributes``."""
    _, _, section = docstring.partition("Attributes:\n")
    section = re.sub(r"^ {4}", "", section, flags=re.MULTILINE)
    found = {}
    for names, text in _ATTRIBUTE.findall(section):
        for name in names.split(", "):
            found[name] = " ".join(text.replace("``", "`").split())
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    shown = list(value) if isinstance(value, tuple) else value
    return f"`{'null' if shown is None else str(shown).lower() if isinstance(shown, bool) else shown}`"
