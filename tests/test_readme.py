"""What the README says is what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

from tokenreduce import catalog
from tokenreduce.registry import MODELS, REDUCERS
from tokenreduce.testing import check_reducer, prompts

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_reducers_is_the_catalogs() -> None:
    (table,) = re.findall(r"<!-- reducers -->\n(.*?)\n<!-- /reducers -->", README, re.DOTALL)
    assert table == catalog.table(), "run `python -m tokenreduce.catalog table` and paste what it prints"


def test_every_reducer_names_its_source() -> None:
    assert [name for name, reducer in REDUCERS.usable().items() if name != "chain" and not reducer.paper] == []


def test_the_table_of_models_is_the_catalogs() -> None:
    (table,) = re.findall(r"<!-- models -->\n(.*?)\n<!-- /models -->", README, re.DOTALL)
    assert table == catalog.models_table(), "run `python -m tokenreduce.catalog table models` and paste what it prints"
    assert all(f"`{name}`" in table for family in MODELS.usable().values() for name in family.classes)


def test_the_example_method_keeps_the_invariants(llava: LlavaForConditionalGeneration) -> None:
    (example,) = re.findall(r"```python\n(from dataclasses.*?)```", README, re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, "README.md", "exec", dont_inherit=True), namespace)
    check_reducer(namespace["LongestFeatures"](), llava, prompts(llava, [1, 3, 0]))
