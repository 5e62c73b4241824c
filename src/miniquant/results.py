"""What a run gives, and what it keeps of a finished layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from miniquant.grid import QuantizedWeight
from miniquant.modules import LeftAlone, Site
from miniquant.recipe import LayerOptions

Method = Literal["gptq", "rtn"]


@dataclass(frozen=True, eq=False)
class LayerResult:
    """One quantized layer.

    Losses are what the layer's squared output error is per token (:func:`miniquant.quantization_loss`, summed over
    rows; the mean over tokens as ``options.token_weights`` weighs them), with the values that the model now computes
    with; None where no token says. The error is that to the output of the layer's own weight or, with
    ``options.corrected_part`` or ``options.corrected_stream``, of the weight that makes up for errors of earlier
    layers; that of rounding to nearest, too. Of a layer with more than 256 rows they are taken from 256 evenly spaced
    ones, the same for each loss, times N / 256.

    Attributes:
        name: of the layer.
        site: the weight in the model.
        options: what the recipe says of it.
        quantized: the weight on its grid; the model holds its values. Where a store keeps it, its tensors are on the
            device "meta": shapes and dtypes without memory.
        method: "rtn" where it is rounded to nearest; a note says why.
        tokens: of calibration.
        held_out_tokens: that were only used to judge.
        ridge: that was used; None for RTN.
        loss, rtn_loss: on calibration tokens, of `quantized` and of rounding to nearest.
        held_out_loss, held_out_rtn_loss: the same on held-out tokens.
        seconds: that its Hessians, the solver and judging took.
        notes: what a person should know, a sentence each.
        restored: whether the store had it, of an earlier run.
    """

    name: str
    site: Site
    options: LayerOptions
    quantized: QuantizedWeight
    method: Method
    tokens: int
    held_out_tokens: int
    ridge: float | None
    loss: float | None
    rtn_loss: float | None
    held_out_loss: float | None
    held_out_rtn_loss: float | None
    seconds: float
    notes: tuple[str, ...]
    restored: bool = False


@dataclass(eq=False)
class ModelResult:
    """A quantized model.

    Attributes:
        layers: by name, in the order in which they were quantized.
        left_alone: weights that were not quantized, with the reason.
        batches: of calibration.
        held_out_batches: the last ones, that were only used to judge.
        seconds: of the whole run, and of its parts: "hessians", "solver", "judging", "gradients" where they are taken,
            and "forward", which is all else; what restored layers took in an earlier run is not in them.
        notes: on the run as a whole.
    """

    layers: dict[str, LayerResult] = field(default_factory=dict)
    left_alone: tuple[LeftAlone, ...] = ()
    batches: int = 0
    held_out_batches: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class QuantizationError(RuntimeError):
    """A layer could not be quantized.

    Attributes:
        layers: names of those it is about.
        result: what was done before; these layers' weights are replaced in the model.
    """

    def __init__(self, message: str, layers: Sequence[str], result: ModelResult) -> None:
        super().__init__(message)
        self.layers = tuple(layers)
        self.result = result


class TooFewTokensError(QuantizationError):
    """Layers saw too few tokens, and the recipe's `unseen` says that this is an error, or proposes what cannot be."""


class Stopped(RuntimeError):  # noqa: N818  (somebody asked for it)
    """A run ended at a layer's boundary because it was asked to.

    Attributes:
        result: what was done before; these layers' weights are replaced in the model.
    """

    def __init__(self, message: str, result: ModelResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, eq=False)
class FinishedLayer:
    """All that a run has to know of a layer that an earlier one finished, to go on to the same bytes.

    Attributes:
        result: of the layer.
        found_ridge: that a layer on the same inputs with the same grid takes; None where there is none.
        searched: whether that ridge was found in the tokens of this layer.
        waited: whether it kept its weight while the walk was among its siblings.
    """

    result: LayerResult
    found_ridge: float | None
    searched: bool
    waited: bool


class LayerStore(Protocol):
    """Keeps finished layers, on a disk for instance, in place of the run's memory."""

    def __contains__(self, name: object) -> bool:
        """Whether a layer of this name is kept."""

    def load(self, site: Site, options: LayerOptions) -> FinishedLayer:
        """A layer that is kept, with its weight in memory."""

    def save(self, layer: FinishedLayer) -> None:
        """Keeps a layer. What it raises ends the run."""
