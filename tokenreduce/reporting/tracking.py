"""Weights & Biases: a finished run's configuration, metrics, per-sample table and pictures.

Nothing here can cost a result: it runs after all is written, never waits for long, and every failure is one warning.
"""

from __future__ import annotations

import netrc
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tokenreduce.evaluation.records import Record
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
    """Where a run is logged; see conf/tracking."""

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
    metrics: Mapping[str, Any],
    reduced: Sequence[Record],
    unreduced: Sequence[Record],
) -> str | None:
    """Log a finished run; returns where it can be found, in words, or None where it was not logged."""
    if not tracking.enabled:
        return None
    try:
        return _log(tracking, folder, config, metrics, reduced, unreduced)
    except Exception as error:  # a tracking service may fail in any way; the results are on disk already
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"this run is not logged to Weights & Biases: {message} (tracking=none turns it off)", stacklevel=2
        )
        return None


def flattened(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the methods' metrics under a name with slashes: ``reducer/score/value``."""
    flat: dict[str, float] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                visit(part, f"{name}/{key}" if name else str(key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value

    for key, method in metrics["methods"].items():
        visit({name: part for name, part in method.items() if name != "knobs"}, key)
    visit({name: metrics["benchmark"][name] for name in ("samples", "images", "errors")}, "benchmark")
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
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    reduced: Sequence[Record],
    unreduced: Sequence[Record],
) -> str:
    import wandb  # here, because it is slow to import and may be missing or broken

    def start(mode: Literal["online", "offline"] | None) -> Any:
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            name=tracking.name or folder.name,
            tags=list(tracking.tags),
            dir=str(folder),
            mode=mode,
            reinit="finish_previous",
            config={**config, "run": metrics["run"]},
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
            warnings.warn(f"Weights & Biases cannot be reached, so this run is logged offline: {message}", stacklevel=3)
            run = start("offline")
    try:
        content: dict[str, Any] = flattened(metrics)
        content["samples"] = wandb.Table(columns=list(COLUMNS), data=sample_rows(reduced, unreduced))
        picture = folder / KEPT_TOKENS
        if tracking.images and picture.exists():
            content["kept_tokens"] = wandb.Image(str(picture))
        run.log(content)
    except BaseException:
        with suppress(Exception):
            run.finish(exit_code=1)
        raise
    run.finish()
    if run.settings.mode == "online":
        return str(run.url)
    return f"offline; to upload: wandb sync {os.path.relpath(Path(run.dir).parent)}"


def _logged_in(wandb: Any) -> bool:
    """Whether wandb would find credentials by itself, without asking and without the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(wandb.setup().settings.base_url).hostname or ""
    try:
        entries = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(host) is not None
