"""Fixture of the benchmarks' tests."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Compute on one thread: the threads of two test processes wait for each other."""
    torch.set_num_threads(1)
