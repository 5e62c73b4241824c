"""Turning the residual stream and the heads' values of a model, which changes no prediction and helps the grid.

Each vector x of the residual stream becomes x R, with R orthogonal: what writes to the stream is multiplied with R,
what reads from it takes R back, and norms do not notice, because |x R| = |x|, once their gains are in the weights
behind them. The values v of each head become v T, and the layer behind the attention takes T back. Nothing is computed
at run time that was not before. A weight of a turned model is a sum of many weights of the old one, so outliers, which
stretch the scale of their group, are gone (SpinQuant, arXiv:2405.16406, R1 and R2; QuaRot, arXiv:2404.00456, without
its rotations at run time).

R = S (H x C): S random signs, H the Hadamard matrix of the largest power of two that divides the size, C the cosine
transform (DCT-II) of what is left, all orthonormal.

Output embeddings that are tied to the embedding take the gain of the last norm, so they are a matrix of their own then.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from miniquant.modules import blocks_of

# Values that are worked on at once, in float64.
_CHUNK = 1 << 22
# A Hadamard matrix is applied in factors of at most this size.
_LARGEST_FACTOR = 64
# A norm that is the one expected differs by rounding.
_TOLERANCE = 1e-4

# Parts of a block. Norms before attention and before the MLP, or the experts.
_NORMS = _ATTENTION_NORM, _MLP_NORM = ("input_layernorm", "post_attention_layernorm")
_VALUES, _BEHIND_VALUES = "self_attn.v_proj.weight", "self_attn.o_proj.weight"
# Parameters that multiply the residual stream, with the norm between; and those whose products are added to it.
_READERS_OF_ATTENTION = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", _VALUES)
_READERS_OF_MLP = (
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.gate.weight",
    "mlp.experts.gate_up_proj",
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert_gate.weight",
)
_READERS = {
    **dict.fromkeys(_READERS_OF_ATTENTION, _ATTENTION_NORM),
    **dict.fromkeys(_READERS_OF_MLP, _MLP_NORM),
}
_WRITERS_OF_MLP = ("mlp.down_proj.weight", "mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight")
_WRITERS = (_BEHIND_VALUES, *_WRITERS_OF_MLP)
_BIAS_OF_VALUES = "self_attn.v_proj.bias"
_ADDED = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
# Parameters that see nothing of it: what is added to or multiplies the readers' products.
_UNTOUCHED = (
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.bias",
)
_HEAD, _BIAS_OF_HEAD = "lm_head.weight", "lm_head.bias"


class Orthogonal:
    """The orthonormal matrix S (H x C) of a size.

    Args:
        size: n.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        power = size & -size
        generator = torch.Generator().manual_seed(size)
        self._signs = 1 - 2 * torch.randint(0, 2, (size,), generator=generator).double()
        self._factors: list[Tensor] = []
        while power > 1:
            factor = min(power, _LARGEST_FACTOR)
            self._factors.append(_hadamard(factor))
            power //= factor
        if size & (size - 1):
            self._factors.append(_cosines(size // (size & -size)))

    def of_rows(self, values: Tensor, gain: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """``values diag(gain) R``, computed in float64, a chunk of rows at a time.

        Args:
            values: [M, n].
            gain: [n]; None is 1.
            dtype: of the result [M, n].
        """
        turned = torch.empty(values.shape, dtype=dtype)
        factors = self._signs if gain is None else gain.double() * self._signs
        rows = max(1, _CHUNK // self.size)
        for some, into in zip(values.split(rows), turned.split(rows), strict=True):
            into.copy_(self._turned(some.double() * factors))
        return turned

    def _turned(self, values: Tensor) -> Tensor:
        inner = self.size
        for factor in self._factors:
            inner //= len(factor)
            values = torch.einsum("afi,fg->agi", values.reshape(-1, len(factor), inner), factor)
        return values.reshape(-1, self.size)


def _hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, pair)
    return matrix / math.sqrt(size)


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II of a size."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place + 0.5) * place.unsqueeze(1)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@dataclass(frozen=True)
class Turn:
    """What becomes of a parameter, in this order.

    Attributes:
        source: the parameter whose values it is made from.
        gain: of a norm, that its columns are multiplied with before they are turned; None for none.
        columns: by which its columns are turned, in runs of its size. A vector counts as one row.
        rows: the same for its rows; of experts, for those of each.
        ones: whether it becomes 1 everywhere: a gain that others have taken.
    """

    source: str
    gain: str | None = None
    columns: Orthogonal | None = None
    rows: Orthogonal | None = None
    ones: bool = False


@dataclass(frozen=True, eq=False)
class Rotation:
    """A turn of a model, by names of its parameters.

    Attributes:
        turns: of all parameters that change.
        head: name of the output embeddings' weight, where that is tied to the embedding and becomes one of its own.
    """

    turns: Mapping[str, Turn]
    head: str | None

    def turned(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """What a parameter becomes, rounded once to float32, or to float64 where it is of that.

        Args:
            name: of one that changes.
            read: gives the values of a parameter of the model as it was, by name.
        """
        turn = self.turns[name]
        values = read(turn.source)
        dtype = torch.promote_types(values.dtype, torch.float32)
        if turn.ones:
            return torch.ones_like(values, dtype=dtype)
        shape = values.shape
        if turn.columns is not None:
            gain = None if turn.gain is None else read(turn.gain)
            between = dtype if turn.rows is None else torch.float64
            values = turn.columns.of_rows(values.reshape(-1, turn.columns.size), gain, between).view(shape)
        if turn.rows is not None:
            flipped = values.transpose(-1, -2)
            turned = turn.rows.of_rows(flipped.reshape(-1, turn.rows.size), dtype=dtype)
            values = turned.view(flipped.shape).transpose(-1, -2)
        return values.contiguous()


def find_rotation(model: nn.Module) -> Rotation:
    """The turn of a model.

    Args:
        model: a causal language model of transformers with blocks as Llama's: norms by the root mean square before
            attention and before a gated MLP or experts, whose outputs are added to the residual stream (Llama, Mistral,
            Mixtral, Qwen2 and Qwen3 with and without experts, SmolLM3, Granite and the like). Its weights may be on
            the device "meta".

    Raises:
        ValueError: for any other; it says what is not as expected.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    blocks = dict(blocks_of(model))
    base = f"{getattr(model, 'base_model_prefix', '')}."
    embedding, gain = f"{base}embed_tokens.weight", f"{base}norm.weight"
    _check_parameters(model, parameters, (embedding, gain, _HEAD), blocks)
    for name in (gain, *(f"{block}.{norm}.weight" for block in blocks for norm in _NORMS)):
        if not _is_root_mean_square(model.get_submodule(name.rpartition(".")[0])):
            raise _refused(model, f"{name} is of another norm")
    hidden = Orthogonal(parameters[gain].shape[0])
    is_tied = parameters[_HEAD] is parameters[embedding]
    turns = {
        embedding: Turn(embedding, columns=hidden),
        gain: Turn(gain, ones=True),
        _HEAD: Turn(embedding if is_tied else _HEAD, gain=gain, columns=hidden),
    }
    for name, block in blocks.items():
        size = getattr(block.get_submodule("self_attn"), "head_dim", None)
        sides = (parameters[f"{name}.{_VALUES}"].shape[0], parameters[f"{name}.{_BEHIND_VALUES}"].shape[1])
        if not isinstance(size, int) or any(side % size for side in sides):
            raise _refused(model, f"{name}.self_attn has no head_dim that divides {sides[0]} and {sides[1]}")
        turns |= _turns_of_block(name, hidden, Orthogonal(size))
    return Rotation({name: turn for name, turn in turns.items() if name in parameters}, _HEAD if is_tied else None)


def _turns_of_block(block: str, hidden: Orthogonal, heads: Orthogonal) -> dict[str, Turn]:
    """The turns of all parameters that a block may have, by name."""
    turns = {f"{block}.{norm}.weight": Turn(f"{block}.{norm}.weight", ones=True) for norm in _NORMS}
    for reader, norm in _READERS.items():
        name, rows = f"{block}.{reader}", heads if reader == _VALUES else None
        turns[name] = Turn(name, gain=f"{block}.{norm}.weight", columns=hidden, rows=rows)
    for writer in _WRITERS:
        name, columns = f"{block}.{writer}", heads if writer == _BEHIND_VALUES else None
        turns[name] = Turn(name, columns=columns, rows=hidden)
    for bias in _ADDED:
        turns[f"{block}.{bias}"] = Turn(f"{block}.{bias}", columns=hidden)
    bias = f"{block}.{_BIAS_OF_VALUES}"
    turns[bias] = Turn(bias, columns=heads)
    return turns


def _check_parameters(
    model: nn.Module, parameters: Collection[str], outside: Collection[str], blocks: Collection[str]
) -> None:
    """Refuses a model with other parameters than those whose part in it is known here."""
    if not blocks:
        raise _refused(model, "it has no blocks")
    of_block = (*(f"{norm}.weight" for norm in _NORMS), *_READERS_OF_ATTENTION, _BEHIND_VALUES)
    for name in (*outside, *(f"{block}.{part}" for block in blocks for part in of_block)):
        if name not in parameters:
            raise _refused(model, f"it has no parameter {name}")
    for block in blocks:
        for of_mlp in (_READERS_OF_MLP, _WRITERS_OF_MLP):
            if not any(f"{block}.{part}" in parameters for part in of_mlp):
                raise _refused(model, f"it has no parameter {block}.{of_mlp[0]}")
    parts = (*of_block, *_READERS, *_WRITERS, *_ADDED, _BIAS_OF_VALUES, *_UNTOUCHED)
    known = {*outside, _BIAS_OF_HEAD, *(f"{block}.{part}" for block in blocks for part in parts)}
    for name in parameters:
        if name not in known:
            raise _refused(model, f"it has a parameter {name}, whose part is not known here")


def _is_root_mean_square(norm: nn.Module) -> bool:
    """Whether a norm is x / sqrt(mean x^2) times its gain: tried on values, with a gain of its own."""
    tried = copy.deepcopy(norm).to_empty(device="cpu").float()
    parameters = list(tried.parameters())
    if len(parameters) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    gain = torch.rand(parameters[0].shape, generator=generator) + 0.5
    values = torch.randn((4, *gain.shape), generator=generator)
    expected = gain * values / values.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        parameters[0].copy_(gain)
        found = tried(values)
    return bool(((found - expected).abs() <= _TOLERANCE * expected.abs().max()).all())


def _refused(model: nn.Module, found: str) -> ValueError:
    return ValueError(
        "rotation: expected a language model with blocks as Llama's or Qwen3's, which can be turned without a change "
        f"of what it computes, but got {type(model).__name__}: {found}"
    )


def rotate_model(model: nn.Module) -> None:
    """Turns a model in place; see the module. Its predictions stay what they are, but for rounding.

    Output embeddings that are tied to the embedding are a parameter of their own afterwards.

    Args:
        model: as of :func:`find_rotation`, in memory, in any floating-point dtype, on any device.

    Raises:
        ValueError: as of :func:`find_rotation`.
    """
    rotation = find_rotation(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gains = {name: parameters[name].detach().clone() for name, turn in rotation.turns.items() if turn.ones}

    def turned(name: str) -> Tensor:
        of = parameters[name]
        values = rotation.turned(name, lambda source: gains.get(source, parameters[source]).detach().cpu())
        return values.to(of.device, of.dtype)

    if rotation.head is not None:
        of = parameters[rotation.head]
        model.get_submodule(rotation.head.rpartition(".")[0]).weight = nn.Parameter(
            turned(rotation.head), of.requires_grad
        )
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]  # of transformers
    with torch.no_grad():
        for name in rotation.turns:
            if name != rotation.head:
                parameters[name].copy_(turned(name))
