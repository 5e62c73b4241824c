"""How much a language model's predictions depend on the outputs of its layers: one backward pass.

Let g_t be the gradient, at the output of a layer at token t, of -log p(y), summed over all positions of the window,
where each next token y is drawn from the model's own prediction. The mean of g g^T over draws is the Fisher information
at that output: to second order it says what an error there does to the Kullback-Leibler divergence of the predictions.
One draw is taken.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniquant._torch_state import evaluation_mode
from miniquant.modules import LinearSite, Site, TransposedSite, blocks_of
from miniquant.walk import MASKS, call, masks_of, not_compiled, on_device_of, without_cache

# Called with a site, the number of the batch and the module's input; gives what is called with the gradient.
Watch = Callable[[Site, int, Tensor], Callable[[Tensor], None]]
# Logits that are worked on at once.
_CHUNK = 1 << 24


def has_gradient(site: Site) -> bool:
    """Whether gradients are taken at a site's output: it is a module's own, and has a row for each token."""
    return isinstance(site, (LinearSite, TransposedSite))


def each_gradient(
    model: nn.Module,
    batches: Sequence[Any],
    sites: Sequence[Site],
    watch: Watch,
    *,
    generator: torch.Generator,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    by_block: bool = False,
    before: Callable[[], None] | None = None,
) -> int:
    """Runs batches forward and back, one after the other.

    Args:
        model: whose output has logits [B, T, V]; it is not changed.
        batches: what it is called with, as :class:`miniquant.walk.Walk` takes them.
        sites: those for which :func:`has_gradient` says True.
        watch: is told of every output, and gives what takes its gradient, of the output's shape.
        generator: draws the next tokens.
        forward: called as ``forward(model, batch)`` in place of ``model(...)``.
        masks: for each batch None or a mask [B, T] of the predictions that count. Without, that of a batch's entries
            which is for what has the logits: "attention_mask", of encoder and decoder "decoder_attention_mask".
        by_block: whether a block runs once more when the backward pass comes to it, so that what it saves for the
            backward pass is in memory for one block at a time.
        before: called before each batch; what it raises ends the passes.

    Returns:
        The number of predictions.

    Raises:
        ValueError: for a model whose output has no logits [B, T, V], and for a mask of another shape than theirs.
    """
    run = call if forward is None else forward
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask_name = MASKS[1] if is_encoder_decoder else MASKS[0]
    number = 0

    def ran(site: Site) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            output.register_hook(watch(site, number, args[0].detach()))
            return output

        return hook

    predictions = 0
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(without_cache(model))
        stack.enter_context(not_compiled())
        stack.enter_context(_frozen(model))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for site in sites:
            for module in site.modules:
                stack.callback(module.register_forward_hook(ran(site)).remove)
        if by_block:
            for _, block in blocks_of(model):
                stack.enter_context(_run_again(block))
        for number, batch in enumerate(batches):
            if before is not None:
                before()
            logits = getattr(run(model, on_device_of(model, batch)), "logits", None)
            if not isinstance(logits, Tensor) or logits.dim() != 3:
                raise ValueError(
                    f"expected a language model, whose output has logits [B, T, V], but got {type(model).__name__}"
                )
            mask = masks_of(batch).get(mask_name) if masks is None else masks[number]
            if mask is not None and mask.shape != logits.shape[:-1]:
                raise ValueError(
                    f"batch {number}: expected a mask of shape {list(logits.shape[:-1])}, as the predictions have, but "
                    f"got shape {list(mask.shape)}"
                )
            predictions += _run_back(logits, mask, generator)
    return predictions


def squared_gradients(
    model: nn.Module, batches: Sequence[Any], sites: Sequence[Site], *, seed: int = 0, **options: Any
) -> dict[str, list[Tensor]]:
    """|g|^2 of every token at the output of each site, float32, a tensor for each batch, on the CPU.

    Args:
        model: as of :func:`each_gradient`, with the other arguments.
        batches: as there.
        sites: of which those without a gradient are left out.
        seed: of the tokens that are drawn.
        options: as there.

    Returns:
        By name of the site; those that a batch does not come to are left out. A module that runs more than once has
        the sum where the shapes are equal.
    """
    found: dict[str, dict[int, Tensor]] = {}

    def watch(site: Site, number: int, _inputs: Tensor) -> Callable[[Tensor], None]:
        def came(gradient: Tensor) -> None:
            squares = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).square().cpu()
            of_site = found.setdefault(site.name, {})
            before = of_site.get(number)
            of_site[number] = squares if before is None or before.shape != squares.shape else before + squares

        return came

    generator = torch.Generator().manual_seed(seed)
    chosen = [site for site in sites if has_gradient(site)]
    each_gradient(model, batches, chosen, watch, generator=generator, by_block=True, **options)
    numbers = range(len(batches))
    return {name: [of_site[n] for n in numbers] for name, of_site in found.items() if len(of_site) == len(batches)}


def _run_back(logits: Tensor, mask: Tensor | None, generator: torch.Generator) -> int:
    """Runs back from -log p of tokens that are drawn from the model; how many there are."""
    gradient = torch.empty_like(logits)
    counted = torch.ones(logits.shape[:-1], dtype=torch.bool) if mask is None else mask.bool().cpu()
    rows = max(1, _CHUNK // logits.shape[-1])
    with torch.no_grad():
        parts = (logits.flatten(0, -2).split(rows), gradient.flatten(0, -2).split(rows), counted.flatten().split(rows))
        for some, into, counts in zip(*parts, strict=True):
            shares = some.float().softmax(-1)
            drawn = torch.multinomial(shares.cpu(), 1, generator=generator).to(shares.device)
            shares.scatter_add_(1, drawn, shares.new_full(drawn.shape, -1.0))
            into.copy_(shares * counts.to(shares.device).unsqueeze(1))
    logits.backward(gradient)
    return int(counted.sum())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While entered, no parameter asks for a gradient."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)  # noqa: FBT003  (it has no name)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_()


@contextmanager
def _run_again(block: nn.Module) -> Iterator[None]:
    """While entered, a block's forward pass saves its inputs only, and runs once more for the backward pass."""
    own = block.__dict__.get("forward")
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.__dict__["forward"] = run
    try:
        yield
    finally:
        if own is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = own
