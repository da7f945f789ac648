"""A site: a place of a model at which reducers act. Each has a file of its own, and ``attach/sites.py`` lists them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from tokenreduce.attach.call import Call
from tokenreduce.attach.views import TowerWatched, Watched, unseen
from tokenreduce.models.family import Inputs, ModelFamily
from tokenreduce.reducer import Step

if TYPE_CHECKING:
    from tokenreduce.attach.attachment import Attachment


class Site:
    """The steps of one reducer at one kind of place, for as long as it is attached.

    kind:    the steps that act there; label: what records call it; name: what tables call it.
    watched: the kind of :class:`Watched` that tells what signals can be shown there.
    before:  True if it acts before the language model; one_by_one: True if pictures must go through the tower singly.
    asked:   what the signals of its own steps ask for.
    """

    kind: ClassVar[type[Step]]
    label: ClassVar[str]
    name: ClassVar[str]
    watched: ClassVar[type[Watched]] = TowerWatched
    before: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = False

    def __init__(self, attachment: Attachment, steps: Sequence[Any]) -> None:
        """Raises ``ValueError`` for a signal that cannot be shown there."""
        self.attachment, self.steps = attachment, steps
        self.reducer, self.family = attachment.reducer, attachment.family
        self.asked = self.watched(self.family, attachment.processor)
        for step in steps:
            for signal in step.sees:
                try:
                    signal.watch(self.asked)
                except ValueError as error:  # Unseen, or a layer that does not exist
                    raise unseen(self.reducer, step, signal, self.family, error) from error

    @classmethod
    def keeping(cls) -> Step | None:
        """A step there that keeps all tokens, to check models by; None where there are no tokens yet."""
        return None if cls.kind.resizes else cls.kind(keep=1.0)

    @classmethod
    def refusal(cls, step: Any, family: ModelFamily) -> str | None:
        """Why models of a family cannot host a step, as the end of a sentence; None where they can."""
        return family.unhosted.get(cls.kind)

    def check(self) -> None:
        """Raise ``ValueError`` where the model, as it is now, cannot host the steps after all."""

    def modules(self) -> Sequence[nn.Module]:
        """The modules that must run as they are: those that hooks stand on."""
        return ()

    def installed(self) -> AbstractContextManager[None]:
        """Stand in the model while this context lasts."""
        return nullcontext()

    def before_tower(self, call: Call, inputs: Inputs) -> Inputs:
        """Act before the vision tower runs; the inputs that it shall run on."""
        return inputs

    def behind_projector(self, call: Call) -> None:
        """Act on what the projector gave, before the language model."""

    @contextmanager
    def prefilling(self, call: Call, inputs: dict[str, Any]) -> Iterator[None]:
        """Act while the language model is prefilled, within this context."""
        yield
