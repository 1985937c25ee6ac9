"""Fixtures of the tests of the store."""

from pathlib import Path

import pytest

from matquant.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")
