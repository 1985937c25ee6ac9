"""Check the first words of docstrings, and that no class name occurs twice in the package.

    python tests/lint_docstrings.py

A docstring begins with a noun phrase or an imperative. A relative or interrogative clause ("What ...", "Whether ...") needs
the signature to be understood; a verb in the third person ("Returns the ...") is neither. Prints ``file:line: problem`` for
each finding; the exit status is 1 if there is one.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "matquant"
CHECKED = (PACKAGE, "experiments", "tests")
FORBIDDEN = re.compile(r"\s*(What|Of|That|Where|Whether|As|Who|Whose|Those|Which|How|When|The same)\b")

# Third person where the imperative belongs; "Checks of ..." and "Times of ..." are nouns.
THIRD_PERSON = re.compile(
    r"\s*(Adds|Applies|Checks|Computes|Converts|Decides|Ends|Finds|Gives|Holds|Keeps|Loads|Makes|Maps|Measures|Quantizes|Raises"
    r"|Reads|Removes|Returns|Rounds|Runs|Shows|Splits|Stores|Takes|Times|Trains|Writes|Yields)\s(?!of\b|and\b|in\b|on\b|that\b)"
)

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Docstrings of a module and of its classes and functions, as syntax nodes."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            assert isinstance(statement.value, ast.Constant)
            yield statement.value


def first_words(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Docstrings that begin with a forbidden word or a verb in the third person."""
    for path, tree in trees.items():
        for node in docstrings(tree):
            match = FORBIDDEN.match(str(node.value)) or THIRD_PERSON.match(str(node.value))
            if match:
                yield f"{path}:{node.lineno}: docstring begins with {match[1]!r}; use a noun phrase or an imperative"


def repeated_classes(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Classes of the package whose name another class of the package has."""
    places = defaultdict(list)
    for path, tree in trees.items():
        if path.parts[0] == PACKAGE:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{path}:{node.lineno}")
    for name, found in places.items():
        for place in found[1:]:
            yield f"{place}: class {name} is also defined at {found[0]}; give one of them another name"


def main() -> int:
    """Print all findings; return 1 if there is one, else 0."""
    paths = sorted(path for folder in CHECKED for path in (ROOT / folder).rglob("*.py"))
    trees = {path.relative_to(ROOT): ast.parse(path.read_bytes()) for path in paths}
    findings = [*first_words(trees), *repeated_classes(trees)]
    print("\n".join(findings or ["docstrings: no findings"]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
