"""Fixtures of the tests of training."""

import pytest
from architectures import make_model, save
from packing import Opened


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A small random model and its parent."""
    folder = tmp_path_factory.mktemp("opened")
    return Opened(save(make_model("llama"), folder / "model"), folder / "store", stretch=1.25)
