import pytest
import torch

import ranks


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(7)


def pytest_sessionfinish():
    ranks.stop_pools()
