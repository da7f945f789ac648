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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tokenreduce.knobs import check_knobs

if TYPE_CHECKING:
    from typing_extensions import Self

    from tokenreduce.signals import Signal

Keep = int | float
"""How much to keep: a ratio of the visual tokens in (0, 1] when a float, a number of tokens when an int.

A number is of what one selection is about, the step's scope: before the language model by default an image (or each
tile or frame of it, where a model cuts images up), inside it a whole sample. Where fewer tokens are there, all of them
are kept.
"""

Count = int | tuple[int, int] | None
"""How many tokens a step leaves: a number, a range ``(least, most)``, or None where only the method itself can tell."""

Layer = int | float
"""A layer: its 0-based index, a negative index from the end, or a fraction of the depth in [0, 1) when a float."""

Positions = Literal["original", "compact"]
"""Which position ids survivors carry: the ``original`` ones, with gaps, or ``compact`` ones, 0 .. n-1.

With ``original`` ones the rows that enter the language model stand in raster order, whatever order a method has: what
GAP (arXiv 2506.21873) asks for, as wrong ids and wrong order both cost grounding. A merged row has the id of the token
that it stands for, one that stands for none the first free id, and the answer goes on from the whole prompt's length.
Where a model's positions are in space and time (M-RoPE), compact ones close up the frames, rows and columns of a
picture of which nothing is left, and what follows the picture; the others keep their arrangement.
"""

Rounding = Literal["floor", "round", "ceil", "even"]
"""What becomes of a half: ``round`` takes it up, ``even`` to the even neighbour, as Python's ``round`` does."""

Scope = Literal["tile", "picture", "sample"]
"""What one selection is about.

tile:    what the encoder attends within: an image, a tile of one where the model cuts images up, a frame.
picture: one image or video whole, all its tiles or frames.
sample:  all pictures of a prompt.
"""

Role = Literal["whole", "thumbnail", "crop", "frame"]
"""What a tile shows: a whole image, the overview of one that is cut up, a part of it, or a frame of a video."""


@dataclass(frozen=True)
class Grid:
    """The layout of one tile's visual tokens: ``height`` x ``width`` of them in raster order."""

    height: int
    width: int

    def __len__(self) -> int:
        return self.height * self.width

    def fit(self, count: int) -> Grid:
        """The largest spatial grid of at most ``count`` tokens whose shape stays close to this one.

        >>> Grid(12, 12).fit(36)
        Grid(height=6, width=6)
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
        """Lay ``coarse`` over this grid: the token nearest each cell's centre ``(cells,)``, and each
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

    def encoder_layer(self, layer: Layer) -> int:
        """The 0-based index of a layer of the vision encoder. Raises ``ValueError`` for one that does not exist."""
        return layer_index(layer, self.encoder_layers)

    def decoder_layer(self, layer: Layer) -> int:
        """The 0-based index of a layer of the language model. Raises ``ValueError`` for one that does not exist."""
        return layer_index(layer, self.decoder_layers)


@dataclass(frozen=True)
class Tile:
    """What a method may know about one tile: an image, a part of one, or a frame of a video.

    grid:    the layout of its tokens as it entered.
    role:    what it shows.
    picture: which of the prompt's pictures it belongs to.
    row, column: where its first token lies in the grid that the parts of its picture form together, in tokens.
    time:    seconds from the beginning of its video, None where the model has none.
    """

    grid: Grid
    role: Role = "whole"
    picture: int = 0
    row: int = 0
    column: int = 0
    time: float | None = None


@dataclass(frozen=True)
class Span:
    """The visual tokens that one selection is about: those of a tile, of a picture, or of a sample.

    geometry: the model's.
    tiles:    what the tokens are of.
    entered:  how many tokens entered: the vision encoder, or the language model where the step is inside that.
    current:  how many are left at this step.
    """

    geometry: Geometry
    tiles: tuple[Tile, ...]
    entered: int
    current: int

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The layout of every tile, as it entered."""
        return tuple(tile.grid for tile in self.tiles)

    @property
    def grid(self) -> Grid:
        """The layout of the only tile; a span of several has none."""
        if len(self.tiles) != 1:
            raise ValueError(f"this span holds {len(self.tiles)} tiles, so it has no single grid")
        return self.tiles[0].grid

    @property
    def times(self) -> tuple[float | None, ...]:
        """The seconds at which each tile was taken, None where the model has no times."""
        return tuple(tile.time for tile in self.tiles)

    @property
    def cut_up(self) -> bool:
        """True where the tiles are parts of a picture that was cut up."""
        return any(tile.role in ("thumbnail", "crop") for tile in self.tiles)

    @property
    def film(self) -> bool:
        """True where the tiles are frames of one size, and all of their tokens are there."""
        alike = all(tile.role == "frame" and tile.grid == self.tiles[0].grid for tile in self.tiles)
        return alike and self.current == len(self.tiles) * len(self.tiles[0].grid)

    def keep(self, keep: Keep, rounding: Rounding = "floor") -> int:
        """How many tokens ``keep`` means of those that entered."""
        return tokens_to_keep(keep, self.entered, rounding)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One place where a reducer acts. Its kinds, the sites, are below, in the order in which a picture passes them.

    keep:     how many tokens it leaves; None for an adaptive step, and where :meth:`TokenReducer.count`, which reads
              it, is overridden.
    rounding: what a ratio is rounded to.
    sees:     the signals that it needs.
    scope:    what one selection is about.
    stage:    a number of the method's own, by which it tells its steps apart.
    ordered:  True if rows go on in the order of ``Selection.index``. Otherwise they do so within a picture of one tile,
              and those of several tiles, or beside newlines, go on in raster order; so do all with original positions.
    member:   which reducer of a chain it belongs to; the chain sets it.

    For whoever adds a site: ``resizes`` is True if it changes the picture and not the tokens, ``behind_encoder`` if
    what it sees has left the vision encoder and not yet entered the language model.
    """

    resizes: ClassVar[bool] = False
    behind_encoder: ClassVar[bool] = False

    keep: Keep | None = None
    rounding: Rounding = "floor"
    sees: tuple[Signal, ...] = ()
    scope: Scope = "tile"
    stage: int = 0
    ordered: bool = False
    member: int = 0

    def decoder_layer(self, geometry: Geometry) -> int | None:
        """The layer of the language model at whose input it acts, None if it acts before the language model."""
        return None


@dataclass(frozen=True, kw_only=True)
class AtInput(Step):
    """Before the vision tower: the picture itself is made smaller, so that it gives ``count`` tokens; 0 takes it
    away."""

    resizes: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class AtEncoder(Step):
    """Inside the vision encoder: after the attention of ``layer``, before its feed-forward network, or after the block.

    A class token stays in the sequence and is not among the tokens that are shown. The scope is a tile.
    """

    layer: Layer
    where: Literal["attention", "block"] = "block"


@dataclass(frozen=True, kw_only=True)
class AtEncoderOutput(Step):
    """Between the vision encoder and the projector, on the features that it takes."""

    behind_encoder: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class AtProjector(Step):
    """After the projector: between the vision side and the language model."""

    behind_encoder: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class AtDecoder(Step):
    """At the input of one layer of the language model, in prefill. Special tokens, such as newlines, are tokens like
    any other there, unless the scope is a tile."""

    layer: Layer
    scope: Scope = "sample"

    def decoder_layer(self, geometry: Geometry) -> int:
        return geometry.decoder_layer(self.layer)


@dataclass
class Selection:
    """What a reducer decided about the ``n`` tokens that it was shown.

    index:    ``(k,)`` long, the token that each output row stands for. Ascending unless a method has an order of its
              own; -1 for a row that stands for none of them, such as a class token that is passed on.
    features: ``(k, dim)``, the rows themselves where a method merges; otherwise the features at ``index`` are taken.
    source:   ``(n,)`` long, the row that each token went into, -1 for a dropped one; from ``index`` if absent.
    size:     ``(k,)``, how many original tokens each row holds, where attention shall count them (in the encoder).
    values:   ``(k, ...)``, numbers of the method's own that follow their rows into its later steps.
    carry:    anything that the same reducer wants to find in ``tokens.carried`` at its next step.
    sight:    ``(sequence, sequence)`` int8, inside the language model: from this layer on the token of a row may (1) or
              may not (-1) attend to that of a column, whatever the layer says; 0 leaves it to the layer. Places are in
              the whole sequence that signals show. Tokens that follow may not attend to what the prompt's last one may
              not.
    """

    index: Tensor
    features: Tensor | None = None
    source: Tensor | None = None
    size: Tensor | None = None
    values: Tensor | None = None
    carry: Any = None
    sight: Tensor | None = None

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
    tile:     ``(n,)`` long, which of ``span.tiles`` each is of; -1 for a special one, such as a newline.
    place:    ``(n,)`` long, their places in the grids of their tiles; -1 where a row stands for none.
    values:   ``(n, ...)``, what an earlier :class:`Selection` of the same reducer gave along; None if none did.
    span:     the layout and the counts.
    keep:     how many to keep. Raises ``ValueError`` at a step whose count is no number.
    carried:  what the previous step's :class:`Selection` carried, None at the first. Where that step made several
              selections of what is seen together here, a list of theirs.

    ``tokens[signal]`` hands over a declared signal; it is computed at that moment.
    """

    def __init__(
        self,
        features: Tensor,
        span: Span,
        count: Count,
        *,
        index: Tensor | None = None,
        tile: Tensor | None = None,
        place: Tensor | None = None,
        values: Tensor | None = None,
        signals: Callable[[Any], Sequence[Any]] | None = None,
        fingerprint: Callable[[], int] = lambda: 0,
        carried: Any = None,
    ) -> None:
        self.features = features
        self.span = span
        self._count = count
        self.index = torch.arange(len(features), device=features.device) if index is None else index
        self.tile = torch.zeros_like(self.index) if tile is None else tile
        self.place = self.index if place is None else place
        self.values = values
        self.carried = carried
        self._signals = signals
        self._fingerprint = fingerprint

    @property
    def adaptive(self) -> bool:
        """True if the method itself decides how many to keep, though perhaps within bounds."""
        return not isinstance(self._count, int)

    @property
    def keep(self) -> int:
        if not isinstance(self._count, int):
            raise ValueError(f"this step is adaptive: its count is {self._count}, so no number says how many to keep")
        return self._count

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The least and the most that may be kept; None where nothing bounds it."""
        return (self._count, self._count) if isinstance(self._count, int) else self._count

    def __len__(self) -> int:
        return len(self.features)

    def each(self, signal: Signal) -> Sequence[Any]:
        """A signal's value for every tile of the span. Of a signal that is about the whole scope there is one."""
        if self._signals is None:
            raise KeyError(f"{signal} was not declared: list it in the step's `sees`")
        return self._signals(signal)

    def __getitem__(self, signal: Signal) -> Any:
        values = self.each(signal)
        if len(values) == 1:
            return values[0]
        if all(isinstance(value, Tensor) for value in values) and sum(map(len, values)) == len(self):
            return torch.cat(list(values))
        raise ValueError(f"{signal} has one value for each of {len(values)} tiles: use tokens.each(...)")

    def best(self, scores: Tensor, count: int | None = None) -> Tensor:
        """The places of the ``count`` (by default ``keep``) highest ``scores``, ascending, ties by order: ``(count,)``.
        ``scores`` are all tokens' ``(n,)``, or those of some, among which the places then are."""
        return best(scores, self.keep if count is None else count)

    def others(self, places: Tensor) -> Tensor:
        """The places of all tokens but those at ``places``, ascending."""
        rest = torch.ones(len(self), dtype=torch.bool, device=self.features.device)
        return rest.index_fill(0, places, False).nonzero()[:, 0]

    def everything(self, carry: Any = None) -> Selection:
        """The selection that keeps all: a step that only looks."""
        return Selection(torch.arange(len(self), device=self.features.device), carry=carry)

    @property
    def coordinates(self) -> Tensor:
        """Row and column of every token in the grid that the parts of its picture form: ``(n, 2)`` long, -1 for special
        ones."""
        tiles = [(tile.grid.width, tile.row, tile.column) for tile in self.span.tiles]
        width, row, column = torch.tensor([*tiles, (1, 0, 0)], device=self.tile.device)[self.tile].unbind(-1)
        inside = torch.stack([self.place // width + row, self.place % width + column], dim=-1)
        return inside.masked_fill((self.tile < 0)[:, None] | (self.place < 0)[:, None], -1)

    def generator(self, seed: int) -> torch.Generator:
        """Randomness from ``seed`` and the picture alone: the same in every batch, different for different pictures."""
        return torch.Generator().manual_seed((seed * 0x9E3779B1 + self._fingerprint()) % 2**63)


@dataclass(frozen=True, kw_only=True)
class TokenReducer(ABC):
    """A method that reduces visual tokens. Subclasses are frozen dataclasses whose fields are the method's knobs.

    paper:  the source, an arXiv id, or a few words for a baseline.
    merges: whether rows are other than the tokens that they stand for.
    parity: what the implementation is checked against.
    compares: what its search, if it has one, is handed of a model's answers: the next token's ``logits``, or the
            last prompt token's ``state`` behind the last layer and its norm.
    """

    paper: ClassVar[str] = ""
    merges: ClassVar[bool] = False
    parity: ClassVar[str] = ""
    compares: ClassVar[Literal["logits", "state"]] = "logits"

    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_knobs(self)
        for keep in (getattr(self, "keep", None), *getattr(self, "keeps", ())):
            if isinstance(keep, int | float):
                check_keep(keep)

    @abstractmethod
    def steps(self, geometry: Geometry) -> Sequence[Step]:
        """Where the method acts on a model of this geometry, in order."""

    def count(self, step: Step, span: Span) -> Count:
        """How many tokens ``step`` leaves of ``span``, known before any embedding exists: by default what the step's
        ``keep`` and ``rounding`` say. A range, or None, for an adaptive method."""
        return None if step.keep is None else span.keep(step.keep, step.rounding)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        """Choose: exactly ``tokens.keep`` rows unless the step is adaptive. Not called for :class:`AtInput`, and no
        choice where none are kept."""
        if tokens.bounds == (0, 0):
            return Selection(tokens.index[:0])
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

    def fingerprint(self) -> str:
        """Digest of all that its selections come from: class, settings, code, and the files that settings name."""
        from tokenreduce import fingerprint

        return fingerprint.of(self)

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
        return Selection(tokens.best(self.score(tokens)))


def best(scores: Tensor, count: int) -> Tensor:
    """The ``count`` indices of the highest ``scores`` in ascending order, ties by lower index, on every device.

    >>> best(torch.tensor([0.5, 0.1, 0.5, 0.9]), 2)
    tensor([0, 3])
    """
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


_AT_ONCE = 1 << 18
"""How many of its numbers :func:`cover` works on at once: 1 MiB, which a processor's cache holds."""


@torch.no_grad()
def cover(
    rows: Tensor,
    count: int,
    weights: Tensor | None = None,
    gains: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """The places of ``count`` columns, in the order in which a greedy search for maximum coverage picks them.

    A row is covered as well as the best of the picked columns covers it, and before that not at all. The search always
    picks the column that adds most; where several add the same, the first of them.

    rows:    ``(rows, columns)``, how well every column covers every row. Beside them little memory is used.
    weights: ``(rows,)``, how much every row counts, by default 1.
    gains:   ``(columns,)``, what every column adds in any case, by default nothing.
    factors: ``(columns,)``, what the coverage that a column adds is multiplied by, by default 1.

    >>> cover(torch.tensor([[0.9, 0.1, 0.8], [0.1, 0.8, 0.7]]), 2)
    tensor([2, 1])
    """
    height = max(1, _AT_ONCE // rows.shape[1])
    weights = rows.new_ones(len(rows)) if weights is None else weights
    gains = rows.new_zeros(rows.shape[1]) if gains is None else gains.clone()
    factors = gains.new_ones(len(gains)) if factors is None else factors
    covered = rows.new_zeros(len(rows), 1)
    picked = torch.empty(count, dtype=torch.long, device=rows.device)
    for step in range(count):
        added = gains.clone()
        for part, so_far, weight in zip(*(each.split(height) for each in (rows, covered, weights)), strict=True):
            added += factors * (weight @ (part - so_far).clamp_(min=0))
        place = added.argmax(keepdim=True)
        picked[step : step + 1] = place
        gains.index_fill_(0, place, -torch.inf)
        covered = torch.maximum(covered, rows.index_select(1, place))
    return picked


def merge(rows: Tensor, group: Tensor, groups: int, how: Literal["sum", "mean"] = "mean") -> Tensor:
    """The mean, or the sum, of the ``rows`` ``(n, dim)`` of every group: ``(groups, dim)``, zeros for an empty one.

    ``group`` ``(n,)`` long says which group each row is of. Rows are added in their order on every device, where a
    scatter on a GPU has another order every time.

    >>> merge(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([1, 0, 1]), groups=3)[:, 0]
    tensor([2., 3., 0.])
    """
    order = group.argsort(stable=True)
    starts = torch.searchsorted(group[order], torch.arange(groups, device=group.device))
    return embedding_bag(order, rows, starts, mode=how)


def density_peaks(points: Tensor, count: int, neighbours: int = 7) -> tuple[Tensor, Tensor]:
    """The places of ``count`` centres of the ``points`` (n, dim), ascending, and the cluster ``(n,)`` of every point.

    Centres are dense, by at most so many ``neighbours``, and far from what is denser; other points go to the nearest.
    This is DPC-KNN as video methods use it, without its random noise.
    """
    # Not by way of a matrix product, whose rounding would give a point a distance to itself.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").div_(points.shape[-1] ** 0.5)
    nearest = distances.topk(min(neighbours, count), largest=False).values
    density, farthest = (-nearest.square().mean(dim=-1)).exp(), distances.max()
    parts = blocks(torch.arange(len(points), device=points.device), len(points))
    separation = [distances[some].where(density > density[some, None], farthest).amin(dim=1) for some in parts]
    centres = best(density * torch.cat(separation), count)
    cluster = torch.cat([distances[some][:, centres].argmin(dim=1) for some in parts])
    cluster[centres] = torch.arange(count, device=cluster.device)
    return centres, cluster


def blocks(places: Tensor, columns: int) -> tuple[Tensor, ...]:
    """``places`` in stretches so short that a float32 matrix with a row for each and ``columns`` columns takes at most
    4 MiB: what a large matrix is worked through in.

    >>> [len(block) for block in blocks(torch.arange(400), columns=6272)]
    [167, 167, 66]
    """
    return places.split(max(1, 2**20 // max(1, columns)))


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
        case "even":
            count = round(exact)
    return min(total, max(1, count))


NextLogits = Callable[[Any, TokenReducer | None], Tensor]
"""A model's logits for the first new token, ``(vocabulary,)``, from a sample and a reducer, or None for the model as it
is; the last prompt token's state ``(dim,)`` for a method that ``compares`` that."""
