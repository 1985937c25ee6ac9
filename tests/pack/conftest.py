"""A small packed model, and quiet and steady loading."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from architectures import make_model, save
from packing import Opened


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("llama")
    return Opened(save(make_model("llama", torch.float16), folder / "model"), folder / "store")


@pytest.fixture(scope="package")
def packed(llama: Opened, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All planes of ``llama``. Not to be written to."""
    return llama.pack(tmp_path_factory.mktemp("packed") / "folder")
