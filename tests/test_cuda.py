"""On a card: pytest -m gpu. What must be right there, by the sections of benchmarks/gpu.py that prove something."""

import pytest
import torch
from test_benchmarks import check_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")]


@pytest.mark.parametrize("section", ["correctness", "scripts", "scaler"])
def test_on_a_card(tmp_path, section):
    assert any(row["ok"] for row in check_gpu(tmp_path, section))
