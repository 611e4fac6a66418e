"""What holds for all tests."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """A test that draws masks or data draws the same ones in every run, in whatever order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
