"""Weights & Biases gets everything, and never costs anything."""

from __future__ import annotations

import json
import struct
import sys
import time
import types
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2

from tokenreduce.evaluation.records import Record
from tokenreduce.evaluation.result import Result
from tokenreduce.reporting import tracking
from tokenreduce.reporting.pictures import KEPT_TOKENS
from tokenreduce.reporting.tracking import COLUMNS, Tracking, flattened, log_report, log_run, sample_rows

CONFIG = {"reducer": {"name": "fopru_row", "keep": 0.25}, "runtime": {"batch_size": 32}}
FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def read_log(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, each record a protobuf message."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = FILE_HEADER, b""
    while position + RECORD_HEADER <= len(content):
        if BLOCK - position % BLOCK < RECORD_HEADER:
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        data = content[position + RECORD_HEADER : position + RECORD_HEADER + length]
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum
        position += RECORD_HEADER + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            message = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            message.ParseFromString(parts)
            yield message


def finished_log(path: Path) -> list[Any]:
    """All records, once the service process, which writes on its own, has written the last."""
    for _ in range(100):
        records = list(read_log(path))
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} was not finished")


def items(messages: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in messages}


def test_an_offline_run_holds_configuration_metrics_samples_and_picture(
    tmp_path: Path, compared: Result, reduced: list[Record], unreduced: list[Record]
) -> None:
    folder = tmp_path / "fopru_row-5f1c"
    (folder / KEPT_TOKENS).parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / KEPT_TOKENS)
    settings = Tracking(project="mine", group="a group", tags=("one",), images=True)
    place = log_run(settings, folder, CONFIG, compared, reduced, unreduced)
    (log,) = folder.rglob("*.wandb")
    assert place is not None
    assert place.endswith(log.parent.name)

    records = finished_log(log)
    (history,) = (items(each.history.item) for each in records if each.HasField("history"))
    run = next(each.run for each in records if each.HasField("run"))
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("mine", folder.name, "a group", ["one"])
    assert items(run.config.update)["reducer"] == CONFIG["reducer"]
    assert items(run.config.update)["run"] == asdict(compared.run)
    assert history["reducer/score/value"] == 0.84
    assert history["random/difference_to_unreduced/low"] == pytest.approx(0.76 - 0.9 - 0.02)
    assert history["benchmark/samples"] == 30
    assert history["kept_tokens/_type"] == "image-file"
    assert history["samples/nrows"] == len(reduced)
    table = json.loads((log.parent / "files" / history["samples/path"]).read_text())
    assert table["columns"] == list(COLUMNS)
    assert table["data"] == sample_rows(reduced, unreduced)


def test_a_report_is_one_run_of_the_sweeps_group_with_its_tables_and_figures(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "figures" / "ranking.png")
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "results.csv").write_text("method,score,p\nbest,0.5,\n")
    (tmp_path / "categories.csv").write_text("method,category\nbest,existence\n")
    place = log_report(Tracking(group="sweep-1"), tmp_path)
    (log,) = tmp_path.rglob("*.wandb")
    assert place is not None and place.endswith(log.parent.name)
    records = finished_log(log)
    run = next(each.run for each in records if each.HasField("run"))
    (history,) = (items(each.history.item) for each in records if each.HasField("history"))
    assert (run.run_group, run.display_name, run.job_type) == ("sweep-1", "report of sweep-1", "report")
    assert history["figures/ranking/_type"] == "image-file"
    assert history["report/_type"] == "html-file"
    table = json.loads((log.parent / "files" / history["results/path"]).read_text())
    assert (table["columns"], table["data"]) == (["method", "score", "p"], [["best", 0.5, None]])


def test_a_picture_is_logged_only_when_asked_for(
    tmp_path: Path, compared: Result, reduced: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(log=logged.update))
    (tmp_path / KEPT_TOKENS).parent.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / KEPT_TOKENS)
    assert log_run(Tracking(), tmp_path, CONFIG, compared, reduced, [])
    assert "kept_tokens" not in logged
    assert log_run(Tracking(images=True), tmp_path, CONFIG, compared, reduced, [])
    assert "kept_tokens" in logged


def test_the_sample_table_has_both_answers_and_the_error(reduced: list[Record], unreduced: list[Record]) -> None:
    failed = replace(reduced[0], answer=None, score=None, error="broken")
    first, second = (dict(zip(COLUMNS, row, strict=True)) for row in sample_rows([failed, reduced[1]], unreduced))
    assert (first["answer"], first["error"], first["unreduced"]) == (None, "broken", unreduced[0].answer)
    assert (second["answer"], second["score"], second["kept"], second["tokens"]) == (reduced[1].answer, 1.0, 36, 144)


def test_every_number_of_the_metrics_is_logged(compared: Result) -> None:
    flat = flattened(compared)
    assert flat["unreduced/time_to_first_token/median"] == 0.0379
    assert all(isinstance(value, int | float) for value in flat.values())
    assert not [name for name in flat if name.endswith(("keep", "layer"))]  # knobs are configuration


def test_no_tracking_starts_nothing(tmp_path: Path, compared: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert log_run(Tracking(enabled=False), tmp_path, CONFIG, compared, [], []) is None
    assert not list(tmp_path.iterdir())


def fake_wandb(**replaced: Any) -> types.ModuleType:
    module = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda content: None,
        finish=lambda exit_code=0: None,
        dir="run/files",
        url="https://example.org/run",
        settings=types.SimpleNamespace(mode="online"),
    )
    content: dict[str, Any] = {
        "init": lambda **options: run,
        "Table": lambda **options: options,
        "Image": lambda path: path,
        "Settings": lambda **options: options,
        "errors": types.SimpleNamespace(Error=RuntimeError),
        "setup": lambda: types.SimpleNamespace(settings=types.SimpleNamespace(base_url="https://api.example.org")),
    }
    for name, value in content.items():
        setattr(module, name, value)
    for name, value in replaced.items():
        setattr(module if hasattr(module, name) else run, name, value)
    return module


def failing(*_: Any, **__: Any) -> None:
    raise RuntimeError("the service is broken\nand says so at length")


@pytest.mark.parametrize("broken", ["import", "setup", "init", "Table", "log", "finish"])
def test_a_failure_is_one_warning(
    broken: str, tmp_path: Path, compared: Result, reduced: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = None if broken == "import" else fake_wandb(**{broken: failing})
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.warns(
        UserWarning, match=r"not logged to Weights & Biases: .* \(tracking=none turns it off\)"
    ) as caught:
        assert log_run(Tracking(), tmp_path, CONFIG, compared, reduced, []) is None
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_without_credentials_a_run_is_offline_and_with_them_online(
    tmp_path: Path, compared: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str | None] = []
    module = fake_wandb()
    init = module.init
    monkeypatch.setattr(module, "init", lambda **options: modes.append(options["mode"]) or init(**options))  # type: ignore[func-returns-value]
    monkeypatch.setitem(sys.modules, "wandb", module)
    log_run(Tracking(), tmp_path, CONFIG, compared, [], [])
    (tmp_path / "netrc").write_text("machine other.example.org login user password secret\n")
    log_run(Tracking(), tmp_path, CONFIG, compared, [], [])
    (tmp_path / "netrc").write_text("machine api.example.org login user password secret\n")
    log_run(Tracking(), tmp_path, CONFIG, compared, [], [])
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    log_run(Tracking(), tmp_path, CONFIG, compared, [], [])
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_run(Tracking(), tmp_path, CONFIG, compared, [], [])
    assert modes == ["offline", "offline", "online", "online", None]


def test_an_unreachable_service_costs_one_warning_and_the_run_is_kept_offline(
    tmp_path: Path, compared: Result, reduced: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "_START_SECONDS", 2.0)
    started = time.monotonic()
    with pytest.warns(UserWarning, match="cannot be reached, so this run is logged offline") as caught:
        place = log_run(Tracking(), tmp_path, CONFIG, compared, reduced, [])
    assert time.monotonic() - started < 60
    assert len(caught) == 1
    assert place is not None
    (log,) = tmp_path.rglob("offline-run-*/*.wandb")
    assert any("reducer/score/value" in items(each.history.item) for each in finished_log(log))
