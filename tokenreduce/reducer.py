"""The interface of a token reducer: everything that the author of a method reads.

A reducer is a frozen dataclass that is its own configuration. It says *where* it acts (:class:`Step` and its kinds),
*what it must see* (``sees``, from :mod:`tokenreduce.signals`), *how many* visual tokens it keeps
(:meth:`TokenReducer.count`)
and *which* (:meth:`TokenReducer.select`). It never touches a model, a hook, a mask or a cache.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenreduce.knobs import check_knobs

if TYPE_CHECKING:
    from typing_extensions import Self

Keep = int | float
"""How much to keep: a ratio of the visual tokens in (0, 1] when a float, a number of tokens when an int.

A number is of what one selection is about: before the language model an image (or each tile or frame of it, where a
model cuts images up), inside it a whole sample. Where fewer tokens are there, all of them are kept.
"""

Layer = int | float
"""A layer: its 0-based index, a negative index from the end, or a fraction of the depth in [0, 1) when a float."""

Positions = Literal["original", "compact"]
"""Which position ids survivors carry: the ``original`` ones, with gaps, or ``compact`` ones, 0 .. n-1.

Where a model's positions are in space and time (M-RoPE), compact ones close up the frames, rows and columns of a
picture of which nothing is left, and what follows the picture; the others keep their arrangement.
"""

Rounding = Literal["floor", "round", "ceil"]


@dataclass(frozen=True)
class Grid:
    """The layout of one image's visual tokens: ``time`` frames of ``height`` x ``width`` tokens in raster order."""

    height: int
    width: int
    time: int = 1

    def __len__(self) -> int:
        return self.time * self.height * self.width

    def fit(self, count: int) -> Grid:
        """The largest spatial grid of at most ``count`` tokens whose shape stays close to this one.

        >>> Grid(12, 12).fit(36)
        Grid(height=6, width=6, time=1)
        """
        shape = self.height / self.width

        def quality(height: int) -> tuple[float, int]:
            width = min(self.width, count // height)
            distortion = (height / width) / shape
            return height * width * min(distortion, 1 / distortion), height * width

        if count < 1:
            raise ValueError(f"a grid holds at least one token, not {count}")
        height = max(range(1, min(self.height, count) + 1), key=quality)
        return Grid(height, min(self.width, count // height))

    def cells(self, coarse: Grid) -> tuple[Tensor, Tensor]:
        """Lay ``coarse`` over one frame of this grid: the token nearest each cell's centre ``(cells,)``, and each
        token's cell ``(tokens,)``."""
        rows = (torch.arange(coarse.height) * 2 + 1) * self.height // (2 * coarse.height)
        columns = (torch.arange(coarse.width) * 2 + 1) * self.width // (2 * coarse.width)
        centres = rows[:, None] * self.width + columns
        rows = torch.arange(self.height) * coarse.height // self.height
        columns = torch.arange(self.width) * coarse.width // self.width
        return centres.flatten(), (rows[:, None] * coarse.width + columns).flatten()


@dataclass(frozen=True)
class Geometry:
    """What a model says about itself before anything is computed.

    encoder_layers, decoder_layers: how deep the vision encoder and the language model are.
    feature_layer: the 0-based encoder layer whose output the projector takes.
    class_token:   whether the encoder's sequence begins with one.
    tokens:        how many visual tokens every image, or tile of one, gives; None where that depends on the image.
    patches_per_token: of how many of the encoder's patches the projector makes one visual token.
    """

    encoder_layers: int
    decoder_layers: int
    feature_layer: int
    class_token: bool
    tokens: int | None = None
    patches_per_token: int = 1


@dataclass(frozen=True)
class Span:
    """The visual tokens that one selection is about: one image's, or a whole sample's.

    geometry: the model's.
    grids:    the layout of every image in it, as it entered.
    entered:  how many tokens entered: the vision encoder, or the language model where the step is inside that.
    current:  how many are left at this step.
    """

    geometry: Geometry
    grids: tuple[Grid, ...]
    entered: int
    current: int

    @property
    def grid(self) -> Grid:
        """The layout of the only image; a span of several images has none."""
        if len(self.grids) != 1:
            raise ValueError(f"this span holds {len(self.grids)} images, so it has no single grid")
        return self.grids[0]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One place where a reducer acts.

    keep:   what :meth:`TokenReducer.count` reads; None for an adaptive step.
    sees:   the signals that it needs.
    member: which reducer of a chain it belongs to; the chain sets it.
    """

    keep: Keep | None = None
    sees: tuple[Hashable, ...] = ()
    member: int = 0


@dataclass(frozen=True, kw_only=True)
class AtInput(Step):
    """Before the vision tower: the picture itself is made smaller, so that it gives ``count`` tokens; 0 takes it
    away."""


@dataclass(frozen=True, kw_only=True)
class AtEncoder(Step):
    """Inside the vision encoder: after the attention of ``layer``, before its feed-forward network, or after the block.

    Sees one image at a time. A class token stays in the sequence and is not among the tokens that are shown.
    """

    layer: Layer
    where: Literal["attention", "block"] = "block"


@dataclass(frozen=True, kw_only=True)
class AtEncoderOutput(Step):
    """Between the vision encoder and the projector, on the features that it takes. Sees one image at a time."""


@dataclass(frozen=True, kw_only=True)
class AtProjector(Step):
    """After the projector: between the vision side and the language model. Sees one image at a time."""


@dataclass(frozen=True, kw_only=True)
class AtDecoder(Step):
    """At the input of one layer of the language model, in prefill. Sees all visual tokens of a sample at once."""

    layer: Layer


@dataclass
class Selection:
    """What a reducer decided about the ``n`` tokens that it was shown.

    index:    ``(k,)`` long, the token that each output row stands for. Ascending unless a method declares another
              order; -1 for a row that stands for none of them, such as a class token that is passed on.
    features: ``(k, dim)``, the rows themselves where a method merges; otherwise the features at ``index`` are taken.
    source:   ``(n,)`` long, the row that each token went into, -1 for a dropped one; from ``index`` if absent.
    size:     ``(k,)``, how many original tokens each row holds, where attention shall count them (in the encoder).
    carry:    anything that the same reducer wants to find in ``tokens.carried`` at its next step.
    """

    index: Tensor
    features: Tensor | None = None
    source: Tensor | None = None
    size: Tensor | None = None
    carry: Any = None

    @classmethod
    def everything(cls, tokens: VisualTokens, carry: Any = None) -> Selection:
        """Keep all: a step that only looks."""
        return cls(torch.arange(len(tokens), device=tokens.features.device), carry=carry)

    def sources(self, entering: int) -> Tensor:
        """``source``, or the one that plain dropping implies: ``(entering,)`` long."""
        if self.source is not None:
            return self.source
        source = self.index.new_full((entering,), -1)
        source[self.index] = torch.arange(len(self.index), device=self.index.device)
        return source


class VisualTokens:
    """The visual tokens of one :class:`Span` at one step, and the signals that the step asked for.

    features: ``(n, dim)``, the tokens as they are at this site.
    index:    ``(n,)`` long, their places among the tokens that entered.
    span:     the layout and the counts.
    keep:     how many to keep. Raises ``ValueError`` at a step whose count is None.
    carried:  what the previous step's :class:`Selection` carried, None at the first.

    ``tokens[signal]`` hands over a declared signal; it is computed at that moment.
    """

    def __init__(
        self,
        features: Tensor,
        span: Span,
        keep: int | None,
        *,
        index: Tensor | None = None,
        signals: Callable[[Hashable], Any] | None = None,
        fingerprint: Callable[[], int] = lambda: 0,
        carried: Any = None,
    ) -> None:
        self.features = features
        self.span = span
        self._keep = keep
        self.index = torch.arange(len(features), device=features.device) if index is None else index
        self.carried = carried
        self._signals = signals
        self._fingerprint = fingerprint

    @property
    def adaptive(self) -> bool:
        """Whether the method itself decides how many to keep."""
        return self._keep is None

    @property
    def keep(self) -> int:
        if self._keep is None:
            raise ValueError("this step is adaptive: its count is None, so nothing says how many to keep")
        return self._keep

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, signal: Hashable) -> Any:
        if self._signals is None:
            raise KeyError(f"{signal} was not declared: list it in the step's `sees`")
        return self._signals(signal)

    def generator(self, seed: int) -> torch.Generator:
        """Randomness from ``seed`` and the picture alone: the same in every batch, different for different pictures."""
        return torch.Generator().manual_seed((seed * 0x9E3779B1 + self._fingerprint()) % 2**63)


@dataclass(frozen=True, kw_only=True)
class TokenReducer(ABC):
    """A method that reduces visual tokens. Subclasses are frozen dataclasses whose fields are the method's knobs.

    paper:  the source, an arXiv id, or a few words for a baseline.
    merges: whether rows are other than the tokens that they stand for.
    parity: what the implementation is checked against.
    """

    paper: ClassVar[str] = ""
    merges: ClassVar[bool] = False
    parity: ClassVar[str] = ""

    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_knobs(self)
        if isinstance(keep := getattr(self, "keep", None), int | float):
            check_keep(keep)

    @abstractmethod
    def steps(self, geometry: Geometry) -> Sequence[Step]:
        """Where the method acts on a model of this geometry, in order."""

    def count(self, step: Step, span: Span) -> int | None:
        """How many tokens ``step`` leaves of ``span``, known before any embedding exists; None for an adaptive
        method."""
        return None if step.keep is None else tokens_to_keep(step.keep, span.entered)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        """Choose: exactly ``tokens.keep`` rows unless the step is adaptive. Not called for :class:`AtInput`."""
        raise TypeError(f"{type(self).__name__} has no step at which there are visual tokens to choose from")

    def positions_after(self, step: Step) -> Positions:
        """The position policy of the tokens that ``step`` leaves."""
        return self.positions

    def with_positions(self, positions: Positions) -> Self:
        """This reducer with another position policy."""
        return dataclasses.replace(self, positions=positions)

    def with_keep(self, keep: Keep) -> Self:
        """This reducer with another setting of how much it keeps: what an equal budget is solved by.

        That is the knob ``keep``; a method whose knob has another name or form overrides this, so that a larger
        ``keep`` never keeps less. Raises ``TypeError`` where there is no such knob, or where it takes no number of
        tokens.
        """
        if not isinstance(getattr(self, "keep", None), int | float):
            raise TypeError(f"{type(self).__name__} has no knob for how much it keeps")
        changes: dict[str, Any] = {"keep": keep}
        return dataclasses.replace(self, **changes)

    def calibrated(
        self, next_logits: NextLogits, samples: Sequence[Any], geometry: Geometry, **settings: Any
    ) -> TokenReducer:
        """This reducer with the knobs that its own search finds on a model: what ``tokenreduce.calibrate`` calls.

        A method that has a search overrides this; ``settings`` are the search's own. Raises ``TypeError`` where there
        is none.
        """
        raise TypeError(f"{type(self).__name__} has nothing to calibrate")

    def parts(self) -> Sequence[TokenReducer]:
        """The methods that this reducer consists of: itself, unless it composes others."""
        return [self]

    @classmethod
    def summary(cls) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]

    def knobs(self) -> dict[str, Any]:
        """The method's settings, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class ScoreReducer(TokenReducer):
    """A method that gives every token a score and keeps the best: override :meth:`score`."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """``(n,)``, higher is better. Equal scores go to the token that comes first."""

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(best(self.score(tokens), tokens.keep))


def best(scores: Tensor, count: int) -> Tensor:
    """The ``count`` indices of the highest ``scores`` in ascending order, ties by lower index, on every device.

    >>> best(torch.tensor([0.5, 0.1, 0.5, 0.9]), 2)
    tensor([0, 3])
    """
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def layer_index(layer: Layer, depth: int) -> int:
    """The 0-based index that ``layer`` means in a stack of ``depth`` layers; a fraction is rounded to the nearest
    layer.

    >>> layer_index(-2, 24), layer_index(0.0625, 32)
    (22, 2)
    """
    index = min(depth - 1, math.floor(layer * depth + 0.5)) if isinstance(layer, float) else layer % depth
    if not (0 <= layer < 1 if isinstance(layer, float) else -depth <= layer < depth):
        raise ValueError(
            f"layer={layer} does not exist in a stack of {depth}: give 0..{depth - 1}, a negative index or a fraction"
        )
    return index


def check_keep(keep: Keep) -> None:
    """Raise ``ValueError`` unless ``keep`` is a ratio in (0, 1] or a positive number of tokens."""
    if isinstance(keep, float) and not 0 < keep <= 1:
        hint = f"; for a number of tokens write {int(keep)}" if keep.is_integer() and keep > 1 else ""
        raise ValueError(f"keep={keep} is not a ratio of the visual tokens: it must be above 0 and at most 1.0{hint}")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(
            f"keep={keep} is not a number of visual tokens: it must be at least 1 (the reducer 'no_image' keeps none)"
        )


def tokens_to_keep(keep: Keep, total: int, rounding: Rounding = "floor") -> int:
    """The number of tokens that ``keep`` means out of ``total``; a ratio keeps at least one.

    >>> tokens_to_keep(0.25, 576), tokens_to_keep(64, 576)
    (144, 64)
    """
    check_keep(keep)
    if isinstance(keep, int):
        return min(keep, total)
    exact = total * keep
    match rounding:
        case "floor":
            count = math.floor(exact + 1e-6)
        case "ceil":
            count = math.ceil(exact - 1e-6)
        case "round":
            count = math.floor(exact + 0.5 + 1e-6)
    return min(total, max(1, count))


NextLogits = Callable[[Any, TokenReducer | None], Tensor]
"""A model's logits for the first new token, ``(vocabulary,)``, from a sample and a reducer, or None for the model as it
is."""
