"""Weights & Biases: a finished run's configuration, metrics, per-sample table and pictures; a sweep's report.

Nothing here can cost a result: it runs after all is written, never waits for long, and every failure is one warning.
"""

from __future__ import annotations

import csv
import netrc
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tokenreduce.evaluation.records import Record
from tokenreduce.evaluation.result import Result
from tokenreduce.reporting.files import CATEGORIES, FIGURES, PAGE, RESULTS
from tokenreduce.reporting.pictures import KEPT_TOKENS

_START_SECONDS = 20.0
_UPLOAD_SECONDS = 60.0

COLUMNS = (
    "id",
    "image",
    "category",
    "question",
    "expected",
    "unreduced",
    "answer",
    "unreduced_score",
    "score",
    "kept",
    "tokens",
    "error",
)
"""Of the per-sample table."""


@dataclass(frozen=True)
class Tracking:
    """The settings of logging; see conf/tracking."""

    enabled: bool = True
    project: str = "tokenreduce"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: Sequence[str] = ()
    images: bool = False


def log_run(
    tracking: Tracking,
    folder: Path,
    config: Mapping[str, Any],
    result: Result,
    reduced: Sequence[Record],
    unreduced: Sequence[Record],
) -> str | None:
    """Log a finished run; returns where it can be found, in words, or None where it was not logged."""

    def content(wandb: Any) -> dict[str, Any]:
        logged: dict[str, Any] = flattened(result)
        logged["samples"] = wandb.Table(columns=list(COLUMNS), data=sample_rows(reduced, unreduced))
        picture = folder / KEPT_TOKENS
        if tracking.images and picture.exists():
            logged["kept_tokens"] = wandb.Image(str(picture))
        return logged

    return _log(tracking, folder, "run", {**config, "run": asdict(result.run)}, content)


def log_report(tracking: Tracking, report: Path) -> str | None:
    """Log a written report, with its tables and figures, as a run of its own; returns as :func:`log_run` does."""

    def content(wandb: Any) -> dict[str, Any]:
        logged: dict[str, Any] = {}
        for path in (report / RESULTS, report / CATEGORIES):
            with path.open(newline="", encoding="utf-8") as file:
                names, *rows = csv.reader(file)
            logged[path.stem] = wandb.Table(columns=names, data=[[_number(cell) for cell in row] for row in rows])
        for path in sorted((report / FIGURES).glob("*.png")):
            logged[f"figures/{path.stem}"] = wandb.Image(str(path))
        logged["report"] = wandb.Html((report / PAGE).read_text(encoding="utf-8"), inject=False)
        return logged

    named = replace(tracking, name=tracking.name or f"report of {tracking.group or report.name}")
    return _log(named, report, "report", {}, content)


def flattened(result: Result) -> dict[str, float]:
    """Every number of the methods' results under a name with slashes: ``reducer/score/value``."""
    flat: dict[str, float] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                visit(part, f"{name}/{key}" if name else str(key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value

    for key, method in result.methods.items():
        visit({name: part for name, part in asdict(method).items() if name != "knobs"}, key)
    benchmark = result.benchmark
    visit({"samples": benchmark.samples, "images": benchmark.images, "errors": benchmark.errors}, "benchmark")
    return flat


def sample_rows(reduced: Sequence[Record], unreduced: Sequence[Record]) -> list[list[Any]]:
    """The per-sample table, a row a sample, in the order of :data:`COLUMNS`."""
    before = {record.id: record for record in unreduced}
    return [
        [
            record.id,
            record.image_id,
            record.category,
            record.question,
            " / ".join(record.expected),
            before[record.id].answer if record.id in before else None,
            record.answer,
            before[record.id].score if record.id in before else None,
            record.score,
            record.entering,
            record.visual_tokens,
            record.error,
        ]
        for record in reduced
    ]


def _log(
    tracking: Tracking,
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    content: Callable[[Any], Mapping[str, Any]],
) -> str | None:
    if not tracking.enabled:
        return None
    try:
        return _logged(tracking, folder, kind, config, content)
    except Exception as error:  # a tracking service may fail in any way; the results are on disk already
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"this {kind} is not logged to Weights & Biases: {message} (tracking=none turns it off)", stacklevel=3
        )
        return None


def _logged(
    tracking: Tracking,
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    content: Callable[[Any], Mapping[str, Any]],
) -> str:
    import wandb  # here, because it is slow to import and may be missing or broken

    def start(mode: Literal["online", "offline"] | None) -> Any:
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            job_type=kind,
            name=tracking.name or folder.name,
            tags=list(tracking.tags),
            dir=str(folder),
            mode=mode,
            reinit="finish_previous",
            config=dict(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_START_SECONDS,
                finish_timeout=_UPLOAD_SECONDS,
                finish_timeout_raises=True,
                x_disable_stats=True,
            ),
        )

    if "WANDB_MODE" in os.environ:
        run = start(None)
    elif not _logged_in(wandb):
        run = start("offline")
    else:
        try:
            run = start("online")
        except (wandb.errors.Error, OSError) as error:
            message = str(error).splitlines()[0]
            warnings.warn(
                f"Weights & Biases cannot be reached, so this {kind} is logged offline: {message}", stacklevel=4
            )
            run = start("offline")
    try:
        run.log(dict(content(wandb)))
    except BaseException:
        with suppress(Exception):
            run.finish(exit_code=1)
        raise
    run.finish()
    if run.settings.mode == "online":
        return str(run.url)
    return f"offline; to upload: wandb sync {os.path.relpath(Path(run.dir).parent)}"


def _number(cell: str) -> float | str | None:
    """A cell of a CSV table as what it was."""
    try:
        return float(cell)
    except ValueError:
        return cell or None


def _logged_in(wandb: Any) -> bool:
    """True if wandb would find credentials by itself, without asking and without the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(wandb.setup().settings.base_url).hostname or ""
    try:
        entries = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(host) is not None
