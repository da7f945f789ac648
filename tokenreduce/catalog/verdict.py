"""Whether a plugin behaves: the checks of :mod:`tokenreduce.testing` on it, one finding after the other."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel

from tokenreduce.attach import sites
from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.catalog.description import LLAVA, knobs
from tokenreduce.models.family import Inputs, ModelFamily
from tokenreduce.models.loading import load
from tokenreduce.reducer import AtProjector, TokenReducer
from tokenreduce.registry import BENCHMARKS, MODELS, REDUCERS, Registry, create
from tokenreduce.testing import BENCHMARK_INVARIANTS, INVARIANTS, Identity, InvariantError, prompts, tiny_llava
from tokenreduce.testing.checkpoints import ask, picture, recipes, video, write_checkpoint
from tokenreduce.testing.invariants import attached

PASSED, REFUSED, FAILED = "passed", "refused", "FAILED"

OF_KEEPING_EVERYTHING = ("identity_changes_nothing", "counts_are_exact", "equals_the_literal_sequence")
"""The invariants that say most about a family when nothing is taken away."""
SEVERAL_TILES = "llava_next_video"
"""The recipe of a small model that cuts up its pictures, with newlines between them, and takes videos."""
SAMPLES = 20
"""How many of a benchmark's samples are looked at."""

Case = tuple[PreTrainedModel, Sequence[Inputs]]
"""A model, and batches of prompts for it."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; ``detail`` says why it is not plainly a pass."""

    what: str
    outcome: str
    detail: str = ""


def findings(registry: Registry[Any], name: str, settings: dict[str, Any], model: str | None) -> Iterator[Finding]:
    """Check the plugin ``name`` with these settings, on a checkpoint or, without one, on small random models: of a
    family on those of its own recipes.

    Raises ``ValueError`` where there is nothing to check: a knob or checkpoint that cannot be used.
    """
    if registry is REDUCERS:
        yield from _reducer(REDUCERS.create(name, **settings), model)
    elif registry is BENCHMARKS:
        yield from _benchmark(BENCHMARKS.create(name, **settings))
    elif model is None:
        yield from _family_by_its_recipes(name)
    else:
        yield from _family(MODELS.get(name), model)


def _reducer(reducer: TokenReducer, checkpoint: str | None) -> Iterator[Finding]:
    yield from _as_a_plugin(reducer, reducer.knobs(), REDUCERS)
    refused = 0
    cases = _small_models(reducer) if checkpoint is None else {checkpoint: lambda: _loaded(checkpoint)}
    for label, make in cases.items():
        model, batches = make()
        try:
            with attached(model, reducer):
                pass
        except ValueError as error:
            refused += 1
            yield Finding(f"works on {label}", REFUSED if refused < len(cases) else FAILED, str(error))
            continue
        yield from _invariants(reducer, model, batches, f"on {label}")


def _benchmark(benchmark: Benchmark) -> Iterator[Finding]:
    settings = {knob.name: getattr(benchmark, knob.name) for knob in knobs(type(benchmark))}
    yield from _as_a_plugin(benchmark, settings, BENCHMARKS)
    for invariant, check in BENCHMARK_INVARIANTS.items():
        yield _finding(invariant.replace("_", " "), partial(check, benchmark, SAMPLES))


def _family_by_its_recipes(name: str) -> Iterator[Finding]:
    family = MODELS.get(name)
    own = recipes({name: family})
    if not own:
        raise ValueError(
            f"{name!r} is a model family without recipes of small checkpoints: give a checkpoint that it serves, "
            "--model DIRECTORY"
        )
    with TemporaryDirectory() as folder:
        for checkpoint, recipe in own.items():
            directory = write_checkpoint(recipe, Path(folder) / checkpoint)
            for finding in _family(family, str(directory), recipe.attention):
                yield replace(finding, what=f"{checkpoint}: {finding.what}")


def _family(family: type[ModelFamily], checkpoint: str, attention: str = "sdpa") -> Iterator[Finding]:
    model, batches = _loaded(checkpoint, attention)
    if type(model).__name__ not in family.classes:
        served = ", ".join(family.classes)
        raise ValueError(
            f"{checkpoint} is a {type(model).__name__}, which the family does not serve; it serves {served}"
        )
    for site in sites.SITES:
        step = site.keeping()
        if step is None:
            continue
        if family.hosts(site.kind):
            where = f"keeping everything at the {site.name}"
            yield from _invariants(Identity(site=step), model, batches, where, OF_KEEPING_EVERYTHING)
        else:
            reason = family.unhosted.get(site.kind, "it gives no reason")
            yield Finding(f"works at the {site.name}", REFUSED, reason)
    if family.hosts(AtProjector):
        yield from _invariants(create("uniform", keep=0.5), model, batches, "dropping half of the tokens")


def _invariants(
    reducer: TokenReducer,
    model: PreTrainedModel,
    batches: Sequence[Inputs],
    where: str,
    names: Collection[str] = tuple(INVARIANTS),
) -> Iterator[Finding]:
    for invariant in names:
        check = INVARIANTS[invariant]
        yield _finding(f"{invariant.replace('_', ' ')}, {where}", partial(_on_batches, check, reducer, model, batches))


def _on_batches(
    check: Callable[..., None], reducer: TokenReducer, model: PreTrainedModel, batches: Sequence[Inputs]
) -> None:
    for batch in batches:
        check(reducer, model, batch)


def _small_models(reducer: TokenReducer) -> dict[str, Callable[[], Case]]:
    """The models that a reducer is checked on: where it sees several tiles at once, one that has such too."""

    def case(**options: Any) -> Case:
        model = tiny_llava(**options)
        return model, [prompts(model, images) for images in ([1], [1, 3, 0])]

    def several() -> Case:
        with TemporaryDirectory() as folder:
            model, processor = load(str(write_checkpoint(SEVERAL_TILES, folder)))
        films = ask(processor, [[], [picture(0, 50, 50)]], [[video(0, 4, 40, 60)], [video(1, 4, 40, 60)]])
        return model, [ask(processor, [[picture(0, 30, 90)], [], [picture(1, 60, 40), picture(2, 50, 50)]]), films]

    cases: dict[str, Callable[[], Case]] = {
        "a model with a class token": case,
        "a model without a class token and with grouped keys": partial(case, tower="siglip", key_heads=2),
    }
    before = [step for step in reducer.steps(LLAVA) if step.decoder_layer(LLAVA) is None]
    return cases | ({"a model with tiles and frames": several} if any(step.scope != "tile" for step in before) else {})


def _loaded(checkpoint: str, attention: str = "sdpa") -> Case:
    model, processor = load(checkpoint, attention=attention)
    tall, wide, square = picture(0, 60, 40), picture(1, 30, 90), picture(2, 50, 50)
    return model, [ask(processor, [[tall]]), ask(processor, [[wide], [], [square, tall]])]


def _as_a_plugin(instance: Any, settings: dict[str, Any], registry: Registry[Any]) -> Iterator[Finding]:
    def described() -> None:
        cls = type(instance)
        if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):  # the latter is a dataclass's own doing
            raise InvariantError("the class has no docstring; its first line is what tables say about it")

    def configured() -> None:
        plain: Any = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(settings))))
        again = registry.create(registry.name_of(instance), **plain)
        if again != instance:
            raise InvariantError(f"made from its own settings it is {again}")

    def sent() -> None:
        if pickle.loads(pickle.dumps(instance)) != instance:
            raise InvariantError("what arrives is not equal to what was sent")

    yield _finding("is described", described)
    yield _finding("can be written into a configuration file and read back", configured)
    yield _finding("can be sent to another process", sent)


def _finding(what: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except InvariantError as error:
        return Finding(what, FAILED, str(error))
    except Exception as error:  # the plugin's own code may raise anything
        return Finding(what, FAILED, f"{type(error).__name__}: {error}")
    return Finding(what, PASSED)
