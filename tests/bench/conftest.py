"""The tiny model as the sides get it."""

import pytest


@pytest.fixture(scope="session")
def setup(base):
    """Float32 whatever the processor, and a device of round figures."""
    import torch  # not at module level: tests without a model should not wait for it
    from tiny import tiny_tokenizer

    from bench.workload import Setup, shape_of
    from looper.params import Model
    from looper.prompts import TEMPLATES

    model = Model(device="cpu", dtype="float32", quantization="none", template="chatml")
    return Setup(base, model, tiny_tokenizer(), TEMPLATES["chatml"], shape_of(base), torch.float32, 1e9, 1e8)
