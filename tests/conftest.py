"""Fixtures shared by all tests: small random-weight models, and one thread (the machine may be small, the models
are)."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tokenreduce.testing import tiny_llava

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava() -> LlavaForConditionalGeneration:
    """A CLIP + Llama model of 36 visual tokens. Shared: tests leave it as they found it."""
    return tiny_llava()
