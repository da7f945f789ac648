"""A compiled model and one that is spread by a device map give the plain one's answers, whatever is reduced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tokenreduce import reduce_tokens
from tokenreduce.evaluation.identity import model_identity
from tokenreduce.models.loading import load
from tokenreduce.testing import prompts, tiny_llava
from tokenreduce.testing.processors import tiny_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_llava()
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{"compiler": "eager"}, {"device_map": "auto"}], ids=str)
def test_another_runtime_answers_alike(options: dict[str, Any], checkpoint: Path) -> None:
    plain, _ = load(str(checkpoint))
    other, _ = load(str(checkpoint), **options)
    inputs = prompts(plain, [1, 2, 0])
    for reducer in ("fopru_rank", "fastv", "pyramiddrop"):
        answers = []
        for model in (plain, other):
            with reduce_tokens(model, reducer):
                answers.append(model.generate(**inputs, do_sample=False, max_new_tokens=4))
        assert torch.equal(*answers), reducer


def test_compiled_code_may_round_otherwise_so_it_is_another_run(checkpoint: Path) -> None:
    (plain, _), (compiled, _) = load(str(checkpoint)), load(str(checkpoint), compiler="eager")
    assert model_identity(plain) != model_identity(compiled)


def test_an_unknown_compiler_is_named_with_those_there_are(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown compiler 'gcc': known: .*inductor"):
        load(str(checkpoint), compiler="gcc")
