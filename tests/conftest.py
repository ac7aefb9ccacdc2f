"""What several test modules share: the tiny base model, made once a session."""

import gc
import os

import pytest

from looper.stage import TORCH

os.environ.update(TORCH)  # as every stage does
gc.disable()  # importing PyTorch makes a million objects, and no garbage


def pytest_collection_finish():
    """What imports made lives on: kept out of the garbage collections that each Trainer asks for, 0.5 s apiece."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tokenizer():
    from tiny import tiny_tokenizer  # not at module level: tests without a model should not wait for torch

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """models/base with its manifest. Read it, never write into it."""
    from tiny import tiny_base

    return tiny_base(tmp_path_factory.mktemp("models") / "base")
