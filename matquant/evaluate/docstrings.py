"""Two tasks for lm-eval from the documentation strings of the standard library, written to a folder at run time.

``stdlib_choice`` shows the head of a function and asks which of four summaries is its own; the other three belong to other
functions. ``stdlib_docstrings`` is the rolling likelihood of whole documentation strings. Nothing is downloaded, and the
same interpreter always gives the same tasks.
"""

import ast
import functools
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

from matquant.data.sources import stdlib

NAMES = ("stdlib_choice", "stdlib_docstrings")

_CHOICES = 4
_ITEMS = 400  # at most, of either task
_SUMMARY = (20, 100)  # letters of a summary that says something and fits a line
_DOCSTRING = (200, 1500)  # letters of a documentation string worth reading whole

_CHOICE_TASK = """\
task: stdlib_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}, train: {shots}}}
  cache_dir: {cache}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{head}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""

_ROLLING_TASK = """\
task: stdlib_docstrings
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1}}
"""


def write_tasks(folder: Path) -> None:
    """Write both tasks and their data into ``folder``, as ``stdlib_choice.yaml`` and ``stdlib_docstrings.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = json.dumps(str(folder / "cache"))
    files = {}
    for name, rows in (
        ("choice", choices("evaluation")),
        ("shots", choices("calibration")),
        ("rolling", [{"text": text} for text in _whole("evaluation")]),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[name] = json.dumps(str(path))
    choice = _CHOICE_TASK.format(data=files["choice"], shots=files["shots"], cache=cache)
    (folder / "stdlib_choice.yaml").write_text(choice, encoding="utf-8")
    rolling = _ROLLING_TASK.format(data=files["rolling"], cache=cache)
    (folder / "stdlib_docstrings.yaml").write_text(rolling, encoding="utf-8")


def choices(split: str) -> list[dict[str, object]]:
    """Questions of one split: ``head`` of a function, four ``choices`` and the number of the right ``answer``."""
    found: dict[str, str] = {}  # by summary: one that several functions share is no question
    for head, summary in _documented(split)[0]:
        if _SUMMARY[0] <= len(summary) <= _SUMMARY[1]:
            found[summary] = "" if summary in found else head
    pairs = [(head, summary) for summary, head in found.items() if head]
    rng = random.Random(split)
    rows = []
    for head, summary in rng.sample(pairs, min(_ITEMS, len(pairs))):
        others = rng.sample([other for _, other in pairs if other != summary], _CHOICES - 1)
        answer = rng.randrange(_CHOICES)
        rows.append({"head": head, "choices": [*others[:answer], summary, *others[answer:]], "answer": answer})
    return rows


def _whole(split: str) -> list[str]:
    texts = [text for text in _documented(split)[1] if _DOCSTRING[0] <= len(text) <= _DOCSTRING[1]]
    texts = list(dict.fromkeys(texts))
    return random.Random(split).sample(texts, min(_ITEMS, len(texts)))


@functools.cache
def _documented(split: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Two lists, made once as they take parsing all sources.

    The head of each documented function up to the opening quotes with the first line of its documentation; and the whole
    documentation of every module, class and function.
    """
    functions, texts = [], []
    for tree in _trees(split):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                texts.append(text)
                if isinstance(node, ast.FunctionDef):
                    head = f'def {node.name}({ast.unparse(node.args)}):\n    """'
                    functions.append((head, text.splitlines()[0].strip()))
    return functions, texts


def _trees(split: str) -> Iterator[ast.Module]:
    for text in stdlib.documents(split):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in old sources
            try:
                yield ast.parse(text)
            except (SyntaxError, ValueError):  # a few files are templates of Python only
                continue
