"""Store commands: ls, verify and clean."""

import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from matquant.errors import UserError
from matquant.store import Store, StoreConfig


def run(config: StoreConfig) -> None:
    """List, verify or clean the store, as ``config.action`` says.

    Raises:
        UserError: verification found damage.
    """
    {"ls": _list, "verify": _verify, "clean": _clean}[str(config.action)](Store(Path(config.path)), Console())


def _list(store: Store, console: Console) -> None:
    table = Table("kind", box=None)
    table.add_column("key", no_wrap=True, min_width=24)
    for name in ("content", "MB", "modified", "state"):
        table.add_column(name)
    for entry in store.ls():
        modified = datetime.datetime.fromtimestamp(entry.modified).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.kind, entry.key, entry.label or "", f"{entry.bytes / 1e6:.1f}", modified, entry.state)
    console.print(table)


def _verify(store: Store, console: Console) -> None:
    problems = store.verify()
    for path, problem in problems:
        console.print(f"{path}: {problem}", soft_wrap=True, highlight=False, markup=False)
    if problems:
        raise UserError(f"{len(problems)} damaged; the next run that needs one remakes it, store=clean removes them.")
    console.print("every artifact is sound")


def _clean(store: Store, console: Console) -> None:
    console.print(f"freed {store.clean() / 1e6:.1f} MB: unfinished drafts that no run holds, and damaged artifacts")
