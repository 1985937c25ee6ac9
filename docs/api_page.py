"""Page of the Python interface, from signatures and docstrings."""

import importlib
import inspect
import re
from typing import Any

# Objects by what a reader wants to do with them, as modules with names.
PUBLIC = {
    "Packed models in Transformers and vLLM": {
        "matquant.transformers.speculation": ("speculate", "Speculation"),
        "matquant.transformers.quantizer": ("set_bits",),
        "matquant.vllm": ("set_bits",),
    },
    "Nested layers in a model of one's own": {
        "matquant.inference": ("replace_linears", "set_bits", "nested_layers", "NestedLinear", "linear", "dequantize"),
        "matquant.formats.planes": ("NestedPlanes",),
    },
    "Parents": {
        "matquant.store": ("Store",),
        "matquant.formats.parent": ("Parent",),
        "matquant.formats.nested": ("NestedWeight", "WeightFormat"),
    },
    "Extensions": {
        "matquant.quantize.config": ("MethodConfig",),
        "matquant.quantize.base": ("BlockQuantizer", "BlockContext", "BlockResult"),
        "matquant.data.sources": ("TextSource",),
        "matquant.pack.formats": ("CheckpointFormat",),
        "matquant.pack.formats.integer_format": ("IntegerFormat",),
        "matquant.inference.kernel_families.base": ("KernelFamily",),
    },
}
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}([\w, .]+): ", re.MULTILINE)


def api_page() -> str:
    """Public functions and classes with their docstrings, as Markdown."""
    parts = ["# Python interface\n"]
    for title, modules in PUBLIC.items():
        parts.append(f"## {title}\n")
        for module, names in modules.items():
            parts += [_described(module, name) for name in names]
    return "\n".join(parts)


def _described(module: str, name: str) -> str:
    found = getattr(importlib.import_module(module), name)
    parts = [f"### {module}.{name}\n", _signature(name, found), _markdown(inspect.getdoc(found) or "")]
    for method, function in inspect.getmembers(found, inspect.isfunction) if inspect.isclass(found) else ():
        text = inspect.getdoc(function)
        if not method.startswith("_") and text and function.__module__.startswith("matquant"):
            first = " ".join(text.split("\n\n")[0].split())
            parts.append(f"- `{method}{_parameters(function)}`: {first}")
    return "\n".join(parts) + "\n"


def _parameters(function: Any) -> str:
    """Names and defaults of parameters; types stand in the code."""
    found = [one for one in inspect.signature(function).parameters.values() if one.name not in ("self", "cls")]
    return str(inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in found]))


def _signature(name: str, found: Any) -> str:
    return f"```python\n{name}{_parameters(found)}\n```\n"


def _markdown(text: str) -> str:
    """Docstring with its sections as lists."""
    first, *sections = _SECTION.split(text)
    parts = [first]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        entries = _ENTRY.sub(r"- `\1`: ", body) if _ENTRY.match(body) else inspect.cleandoc("\n" + body)
        parts.append(f"**{title}**\n\n{re.sub(r'^ {5,}', '  ', entries, flags=re.MULTILINE).rstrip()}\n")
    return "\n".join(parts) + "\n"
