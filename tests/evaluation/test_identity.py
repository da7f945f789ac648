"""The hash of a run changes with everything that can change an answer, and with nothing else."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tokenreduce import create
from tokenreduce.evaluation.identity import (
    content_hash,
    model_identity,
    processor_identity,
    run_identity,
    source_digest,
)
from tokenreduce.evaluation.runner import Runner
from tokenreduce.testing.models import tiny_llava
from tokenreduce.testing.processors import tiny_processor

SETTINGS: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 3, "prompt": "{question}"}


@pytest.fixture
def hashed(model: Any, processor: Any, cards: Any) -> Any:
    def hashed(**changes: Any) -> str:
        parts = {
            "model": model,
            "processor": processor,
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
    runner = Runner(model, used, cards())
    runner.inputs(runner.samples()[:4])
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
    digests = [source_digest(method)]
    (package / "helper.py").write_text("WEIGHT = 2\n", encoding="utf-8")
    digests.append(source_digest(method))
    (package / "__init__.py").write_text("class Method:  # better\n    ...\n", encoding="utf-8")
    digests.append(source_digest(method))
    (tmp_path / "elsewhere.py").touch()
    assert source_digest(method) == digests[-1] and len(set(digests)) == 3
    del sys.modules["a_method"]


def test_a_class_without_a_file_has_an_identity_too() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("class Method: ...", namespace)
    assert isinstance(source_digest(namespace["Method"]), str)


def test_libraries_and_the_core_count(hashed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenreduce.evaluation import identity

    before = hashed()
    monkeypatch.setattr(identity, "version", lambda name: "9.9")
    libraries = hashed()
    monkeypatch.undo()
    monkeypatch.setattr(identity, "_core_digest", lambda: "edited")
    assert len({before, libraries, hashed()}) == 3


def test_what_was_run_so_far_does_not_count(hashed: Any, cards: Any) -> None:
    assert hashed(benchmark=replace(cards(), count=24)) == hashed()
