import pytest


@pytest.fixture(autouse=True)
def single_threaded(one_thread: None) -> None:
    """Run every test here on one thread."""
