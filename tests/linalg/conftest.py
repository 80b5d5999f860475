"""The linear algebra is tested with as many threads as OMP_NUM_THREADS says, other tests with one."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _threads(_one_thread: None) -> Iterator[None]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(1)
