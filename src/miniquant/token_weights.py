"""How much each calibration token counts in a layer's Hessian, X diag(w) X^T.

Plain GPTQ counts all tokens alike. Two things are wrong with that, and each has a weight of its own:

- ``norm``: w = 1 / |x|^2, so every token's *relative* output error counts the same. Without it a few tokens with large
  inputs decide what the layer keeps.
- ``position``: the first token of a causal sequence counts 1 + (T - 1) / 4 times. Attention heads of language models
  park their attention on it (Xiao et al. 2023, arXiv:2309.17453), so its error reaches every later token. If a token's
  values have independent errors e_j, the error of query i is sum_j a_ij e_j, and the square of e_j counts
  sum_i a_ij^2 times in all outputs. For the first token a^2 is a quarter or so on average over heads and layers; for
  others the sum is below 1 (docs/algorithm.md, "Weights of tokens").
- ``gradient``: the root of norm times position times |g|^2, where g is the gradient of the model's predictions at the
  layer's output (:mod:`miniquant.gradients`). |g|^2 of one token is a single draw, mostly noise: the geometric mean
  with the other weights is better than either.

Weights of inputs of 16 bits are rounded to powers of two: w x then has 16 bits too, and a Hessian of such inputs takes
one product where it would take three.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from miniquant.modules import ExpertSite, Site

TokenWeights = Literal["uniform", "norm", "position", "norm+position", "gradient"]
SCHEMES: tuple[TokenWeights, ...] = get_args(TokenWeights)
GRADIENT: TokenWeights = "gradient"

# The mean of the squared attention that a later token pays to the first.
SQUARED_ATTENTION = 0.25
# A token whose |x|^2 is this part of the median counts no more than one at that bound: weights stay finite.
LEAST_NORM = 1e-4
# Norms whose squares float32 holds with all its digits, for as many columns as there are.
IN_RANGE_OF_FLOAT32 = (1e-15, 1e15)
# Of 16 bits, that are converted to float32 together.
TOKENS_AT_ONCE = 128


def causal_sites(model: nn.Module, sites: list[Site]) -> set[int]:
    """The ids of those sites whose inputs are tokens in causal order.

    A site is taken for causal where the nearest module around it that has an attention with an attribute ``is_causal``
    (as transformers' have) has one that says True: encoders, vision towers and cross-attention are not.
    """
    states: dict[str, bool] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        stated = getattr(module, "is_causal", None)
        if isinstance(stated, bool):
            for around in (name, *_modules_around(name)):
                states[around] = states.get(around, False) or stated
    return {id(site) for site in sites if _is_causal(site, states)}


def _is_causal(site: Site, states: dict[str, bool]) -> bool:
    if isinstance(site, ExpertSite) or site.geometry is not None:
        return False  # its inputs are not in the order of a text
    return next((states[name] for name in _modules_around(site.name) if name in states), False)


def _modules_around(name: str) -> Iterator[str]:
    """The names of the modules that a module is in, nearest first; the last one is the model's, ""."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _norms_in_float32(inputs: Tensor) -> Tensor:
    """|x| of tokens [..., K], float32 [...]."""

    def of(tokens: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)
        return norms

    if inputs.device.type != "cpu" or inputs.element_size() != 2 or not inputs.numel():
        return of(inputs)
    # A conversion to float32 of a few tokens at a time takes memory that is used again, not new memory.
    chunks = inputs.reshape(-1, inputs.shape[-1]).split(TOKENS_AT_ONCE)
    return torch.cat([of(chunk) for chunk in chunks]).view(inputs.shape[:-1])


def _norms(inputs: Tensor) -> Tensor:
    """|x| of tokens [..., K], float64 [...].

    Summed in float32 where no square leaves its range: float64 takes several times as long.
    """
    if inputs.dtype != torch.float64:
        norms = _norms_in_float32(inputs)
        if bool(norms.clamp(*IN_RANGE_OF_FLOAT32).eq(norms).all()):
            return norms.double()
    wide: Tensor = torch.linalg.vector_norm(inputs, dim=-1, dtype=torch.float64)
    return wide


def norm_weights(inputs: Tensor) -> Tensor:
    """1 / |x|^2 of tokens [..., K], bounded for the smallest, float64 [...]; 1 of tokens that are not finite."""
    squares = _norms(inputs).square()
    if not squares.numel():
        return squares
    least = LEAST_NORM * squares.median()
    least = torch.where(least > 0, least, squares.mean())
    usable = squares.isfinite() & (least > 0)
    return torch.where(usable, squares.clamp(min=least), torch.ones_like(squares)).reciprocal()


def position_weights(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Of tokens [B, T, K]: 1, but 1 + (T - 1) / 4 for the first that is no padding; T counts no padding either."""
    shape = inputs.shape[:-1]
    counted = torch.ones(shape, dtype=torch.bool, device=inputs.device) if mask is None else mask.to(inputs.device)
    first = counted & (counted.cumsum(-1) == 1)
    after = (counted.sum(-1, keepdim=True) - 1).clamp(min=0)
    return 1 + first * (SQUARED_ATTENTION * after.double())


def _rounded(weights: Tensor, inputs: Tensor) -> Tensor:
    """The nearest powers of two for inputs of 16 bits, else the weights as they are."""
    return weights.log2().round().exp2() if inputs.element_size() == 2 else weights


def weigh(
    inputs: Tensor,
    mask: Tensor | None,
    scheme: TokenWeights,
    *,
    causal: bool,
    gradients: Tensor | None = None,
    relative_to: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The weights of a batch's tokens.

    Args:
        inputs: [..., K].
        mask: bool [...], False for padding; None: there is none.
        scheme: which weights.
        causal: whether inputs are [B, T, K] in causal order; otherwise positions count alike.
        gradients: |g|^2 of the tokens [...], for the scheme "gradient"; None: the layer has none, and the scheme is
            "norm+position".
        relative_to: [..., N], what the layer's outputs are added to, in whose norms their errors are then counted;
            None: in those of the inputs.

    Returns:
        The weights [...], powers of two for inputs of 16 bits, and those without the factors of position and gradient,
        None where all are 1. The second ones say how many tokens the sample amounts to: the first tokens of sequences
        are nearly the same vector, so they count often without being few samples of much.
    """
    of_norm = inputs if relative_to is None else relative_to
    sampled = None if scheme in ("uniform", "position") else _rounded(norm_weights(of_norm), inputs)
    weights = sampled
    if causal and inputs.dim() == 3 and scheme not in ("uniform", "norm"):
        factors = _rounded(position_weights(inputs, mask), inputs)
        weights = factors if weights is None else weights * factors
    if gradients is not None and weights is not None:
        weights = _rounded((weights * gradients.to(weights)).sqrt(), inputs)
    return weights, sampled
