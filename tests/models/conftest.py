import pytest


@pytest.fixture(autouse=True)
def of_all_tests_here(one_thread: None) -> None: ...
