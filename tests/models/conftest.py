"""Every test of a model starts without compiled code: Dynamo shares it between equal models."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
