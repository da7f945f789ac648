"""The hash of a run changes with everything that can change an answer, and with nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tokenreduce import create, fingerprint
from tokenreduce.evaluation.identity import (
    content_hash,
    model_identity,
    processor_identity,
    run_identity,
)
from tokenreduce.evaluation.prompts import Prompts
from tokenreduce.evaluation.transformers_backend import TransformersBackend
from tokenreduce.testing.models import tiny_llava
from tokenreduce.testing.processors import tiny_processor

SETTINGS: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 3, "prompt": "{question}"}


@pytest.fixture
def hashed(model: Any, processor: Any, cards: Any) -> Any:
    def hashed(**changes: Any) -> str:
        backend = TransformersBackend(changes.pop("model", model), changes.pop("processor", processor))
        parts = {
            "answering": backend.identity(),
            "benchmark": cards(),
            "reducer": create("random"),
            **SETTINGS,
            **changes,
        }
        return content_hash(run_identity(**parts))

    return hashed


def test_the_same_run_has_the_same_hash(hashed: Any, cards: Any) -> None:
    assert hashed() == hashed(benchmark=cards(), reducer=create("random"), model=tiny_llava())
    assert len(hashed()) == 12


def test_whatever_changes_answers_changes_the_hash(hashed: Any, cards: Any, model: Any) -> None:
    with torch.no_grad():
        other_weights = tiny_llava()
        next(other_weights.parameters()).view(-1)[0] += 1
    changes = [
        {"reducer": create("uniform")},
        {"reducer": create("random", keep=0.5)},
        {"reducer": create("random", seed=1)},
        {"reducer": create("random", positions="original")},
        {"benchmark": cards(seed=1)},
        {"benchmark": type("Cards", (cards,), {"fingerprint": lambda self: "other files"})()},
        {"batch_size": 8},
        {"max_new_tokens": 4},
        {"prompt": "{question} Answer in a word."},
        {"model": tiny_llava(seed=1)},
        {"model": other_weights},
        {"model": tiny_llava(dtype=torch.float64)},
        {"model": tiny_llava(attention="eager")},
        {"model": tiny_llava(grid=4)},
        {"processor": tiny_processor(model, ["other"])},
    ]
    hashes = [hashed(), *(hashed(**change) for change in changes)]
    assert len(set(hashes)) == len(hashes)


def test_a_processor_is_known_by_its_settings_not_by_its_past(model: Any, cards: Any) -> None:
    used, fresh = tiny_processor(model, ["top"]), tiny_processor(model, ["top"])
    prompts = Prompts(cards())
    TransformersBackend(model, used).inputs([prompts.prompt(sample) for sample in prompts.samples(0, 4)])
    assert processor_identity(used) == processor_identity(fresh)
    fresh.chat_template += " "
    assert processor_identity(used) != processor_identity(fresh)
    fresh = tiny_processor(model, ["top"])
    fresh.image_processor.do_center_crop = False
    assert processor_identity(used) != processor_identity(fresh)


def test_a_checkpoint_is_known_by_its_files_not_by_its_path(model: Any, tmp_path: Path) -> None:
    def loaded(folder: Path) -> dict[str, Any]:
        return model_identity(AutoModelForImageTextToText.from_pretrained(folder))

    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
    assert "files" in loaded(tmp_path / "one") and loaded(tmp_path / "one") == loaded(tmp_path / "other")
    tiny_llava(seed=1).save_pretrained(tmp_path / "other")
    assert loaded(tmp_path / "one") != loaded(tmp_path / "other"), "files that were replaced are read again"


def test_a_hub_model_is_known_by_its_commit(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "_name_or_path", "somebody/some-model")
    monkeypatch.setattr(model, "name_or_path", "somebody/some-model")
    identities = []
    for commit in ("abc", "def"):
        monkeypatch.setattr(model.config, "_commit_hash", commit, raising=False)
        identities.append(model_identity(model))
    assert [identity["revision"] for identity in identities] == ["abc", "def"]
    assert identities[0]["name"] == "somebody/some-model"


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_a_methods_source_counts_with_its_helpers(tmp_path: Path) -> None:
    package = tmp_path / "a_method"
    package.mkdir()
    (package / "__init__.py").write_text("class Method: ...\n", encoding="utf-8")
    (package / "helper.py").write_text("WEIGHT = 1\n", encoding="utf-8")
    method = module(package / "__init__.py").Method
    digests = [fingerprint.code_of(method)]
    (package / "helper.py").write_text("WEIGHT = 2\n", encoding="utf-8")
    digests.append(fingerprint.code_of(method))
    (package / "__init__.py").write_text("class Method:  # better\n    ...\n", encoding="utf-8")
    digests.append(fingerprint.code_of(method))
    (tmp_path / "elsewhere.py").touch()
    assert fingerprint.code_of(method) == digests[-1] and len(set(digests)) == 3
    del sys.modules["a_method"]


BENCHMARK = """
from dataclasses import dataclass
from tokenreduce.benchmarks.benchmark import Benchmark, Sample
import their_scoring

@dataclass(frozen=True)
class Theirs(Benchmark):
    rules: str = ""
    def __len__(self): return 1
    def __getitem__(self, index): return Sample("1", "?", ("yes",), "all", "1")
    def images(self, sample): return []
    def score(self, answer, sample): return their_scoring.score(answer)
"""
METHOD = """
from dataclasses import dataclass
import my_helper
from tokenreduce.reducer import TokenReducer

@dataclass(frozen=True)
class Mine(TokenReducer):
    def steps(self, geometry): return []
"""


def test_helpers_beside_a_module_and_named_files_count(
    hashed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    files = {"my_method.py": METHOD, "their_benchmark.py": BENCHMARK, "rules.json": "1"}
    helpers = {"my_helper.py": "WEIGHT = 1\n", "their_scoring.py": "def score(answer): return 0.1\n"}
    for name, content in {**files, **helpers}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    method, benchmark = importlib.import_module("my_method"), importlib.import_module("their_benchmark")
    parts = {"reducer": method.Mine(), "benchmark": benchmark.Theirs(rules=str(tmp_path / "rules.json"))}
    hashes = [hashed(**parts)]
    for name in (*helpers, "rules.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("1", "2"), encoding="utf-8")
        hashes.append(hashed(**parts))
    assert len(set(hashes)) == 4
    assert hashed(**parts) == hashes[-1]
    for name in (*helpers, "my_method.py", "their_benchmark.py"):
        del sys.modules[name.removesuffix(".py")]


def test_a_class_without_a_file_has_an_identity_too() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("class Method: ...", namespace)
    assert isinstance(fingerprint.code_of(namespace["Method"]), str)


def test_libraries_and_the_core_count(hashed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenreduce.evaluation import identity

    before = hashed()
    monkeypatch.setattr(identity, "version", lambda name: "9.9")
    libraries = hashed()
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "library", lambda: "edited")
    assert len({before, libraries, hashed()}) == 3


def test_what_was_run_so_far_does_not_count(hashed: Any, cards: Any) -> None:
    assert hashed(benchmark=replace(cards(), count=24)) == hashed()
