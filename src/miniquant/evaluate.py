"""How well a model speaks, and how near it is to the one it was made from.

A window is a row of a batch (:mod:`miniquant.calibration`). Token t of a window is predicted by the model's logits at
t - 1; the predictions that count are those where neither t - 1 nor t is padding. With p the softmax of the reference's
logits and q that of the model's, and the means taken over all predictions of all windows:

- loss: the mean of -ln q(token t), in nats; perplexity: its exponential;
- KL divergence: the mean of sum_v p(v) (ln p(v) - ln q(v)) over the vocabulary, in nats; not negative but for rounding;
- same top token: the share of predictions in which both find the same token likeliest.

Log-softmax is taken in float32 whatever the model computes in; sums over predictions are float64.

Standard errors
    Tokens of a window depend on one another, so windows are what counts as independent. A mean m is that of a ratio,
    sum_w S_w / sum_w n_w, where window w has n_w predictions that sum to S_w; its standard error is

    ``sqrt(W / (W - 1) * sum_w (S_w - m n_w)^2) / sum_w n_w``

    which for windows of equal length is the standard deviation of their means over sqrt(W). That of the perplexity is
    the loss's times the perplexity. One window alone has none.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miniquant._torch_state import evaluation_mode
from miniquant.calibration import Batch, given_batch

_CHUNK = 1 << 24  # logits that are worked on at once


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far off it may be.

    Attributes:
        value: the mean.
        standard_error: over windows; None of a single one, and where the mean is infinite.
    """

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class LanguageScores:
    """What :func:`evaluate` found; the module defines each.

    Attributes:
        windows: that have a prediction.
        predictions: how many count.
        loss: in nats.
        perplexity: exp(loss).
        kl_divergence: of the reference from the model, in nats; None without a reference.
        same_top: share of equal top tokens, 0 to 1; None without a reference.
        reference_perplexity: of the reference on the same predictions; None without one.
    """

    windows: int
    predictions: int
    loss: Estimate
    perplexity: Estimate
    kl_divergence: Estimate | None = None
    same_top: Estimate | None = None
    reference_perplexity: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class EmbeddingScores:
    """What :func:`compare_embeddings` found.

    Attributes:
        windows: that were embedded.
        cosine: the mean cosine of the model's embedding of a window with the reference's.
        least_cosine: the least.
    """

    windows: int
    cosine: Estimate
    least_cosine: float

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


class Reference:
    """A model whose logits are computed once, for evaluating several others against it.

    The model must stay as it is. To quantize it in place, or to be rid of it, :meth:`keep` all logits first.

    Args:
        model: with a language model's head.
        max_bytes: of logits that are kept; those of further batches are computed each time.

    Example:
        >>> reference = Reference(float_model)
        >>> scores = [evaluate(model, batches, reference=reference) for model in quantized_models]
    """

    def __init__(self, model: nn.Module, *, max_bytes: int = 1 << 31) -> None:
        _check_module("Reference", "model", model)
        if max_bytes < 0:
            raise ValueError(f"Reference: expected max_bytes to be at least 0, but got {max_bytes}")
        self.model: nn.Module | None = model
        self.max_bytes = max_bytes
        self._kept: dict[bytes, list[Tensor]] = {}
        self._bytes = 0

    @property
    def kept_bytes(self) -> int:
        """Of the logits that are kept."""
        return self._bytes

    def keep(self, batches: Iterable[Tensor | Mapping[str, Any]]) -> None:
        """Computes and keeps the logits of these batches, and lets go of the model.

        Raises:
            ValueError, TypeError: as :func:`evaluate`; also where they need more than ``max_bytes``.
        """
        with contextlib.nullcontext() if self.model is None else evaluation_mode(self.model):
            for where, batch in _checked("Reference", batches):
                self.logits(batch, where)
                if _digest(batch) not in self._kept:
                    raise ValueError(f"{where}: expected logits of at most {self.max_bytes} bytes, but got more")
        self.model = None

    def logits(self, batch: Batch, where: str) -> list[Tensor]:
        """The logits [n, V] of each row's predictions; `where` begins what is said of a bad batch."""
        key = _digest(batch)
        if key in self._kept:
            return self._kept[key]
        if self.model is None:
            raise ValueError(f"{where}: expected a batch whose logits the reference has kept, but got another")
        rows = _logits(self.model, batch, f"{where}: the reference")
        size = sum(row.numel() * row.element_size() for row in rows)
        if self._bytes + size <= self.max_bytes:
            self._kept[key] = rows
            self._bytes += size
        return rows


def evaluate(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], *, reference: nn.Module | Reference | None = None
) -> LanguageScores:
    """Perplexity of a causal language model, and how near its predictions are to a reference's.

    The model is run in evaluation mode and left in the mode that it was in; batches are moved to the device of its
    first parameter.

    Args:
        model: with a language model's head: its output has ``logits`` [B, L, V], or is that tensor, or a tuple that
            begins with it.
        batches: token ids [B, L], or mappings of the model's arguments with ``input_ids`` and perhaps
            ``attention_mask``: :class:`miniquant.Calibration` has them.
        reference: the model to compare with, or :class:`Reference`, which keeps its logits for the next call.

    Raises:
        ValueError, TypeError: for a bad argument, logits of another shape or that are not numbers, or batches without a
            prediction.

    Example:
        >>> text = load_calibration("held_out.txt", tokenizer, tokens=32768, sequence_length=512)
        >>> scores = evaluate(quantized, text.batches, reference=model)
        >>> print(scores.perplexity.value, scores.kl_divergence)
    """
    against = Reference(reference, max_bytes=0) if isinstance(reference, nn.Module) else reference
    _check_module("evaluate", "model", model)
    if against is not None and not isinstance(against, Reference):
        raise TypeError(
            f"evaluate: expected reference to be a torch.nn.Module or a Reference, but got {type(against).__name__}"
        )
    names = ["loss"] if against is None else ["loss", "kl_divergence", "same_top", "reference_loss"]
    sums: list[list[float]] = []  # by window: the sum of each over its predictions
    counts: list[int] = []
    with contextlib.ExitStack() as modes:
        for module in (model, None if against is None else against.model):
            if module is not None:
                modes.enter_context(evaluation_mode(module))
        for where, batch in _checked("evaluate", batches):
            expected = None if against is None else against.logits(batch, where)
            got = _logits(model, batch, f"{where}: the model")
            for row, (logits, ids, counting) in enumerate(zip(got, batch["input_ids"], _counting(batch), strict=True)):
                targets = ids[1:][counting]
                if not len(targets):
                    continue
                if int(targets.max()) >= logits.shape[-1]:
                    raise ValueError(
                        f"{where}: expected token ids less than {logits.shape[-1]}, the number of the model's logits, "
                        f"but got {int(targets.max())}"
                    )
                of_reference = None if expected is None else expected[row]
                if of_reference is not None and of_reference.shape != logits.shape:
                    raise ValueError(
                        f"{where}: expected model and reference to have one vocabulary, but got {logits.shape[-1]} and "
                        f"{of_reference.shape[-1]} logits"
                    )
                sums.append(_window_sums(logits, targets, of_reference))
                counts.append(len(targets))
    if not counts:
        raise ValueError("evaluate: expected a window of at least two tokens, but got none")
    means = dict(zip(names, map(_ratio, zip(*sums, strict=True), [counts] * len(names)), strict=True))
    loss, of_reference_loss = means["loss"], means.pop("reference_loss", None)
    return LanguageScores(
        len(counts),
        sum(counts),
        loss,
        _exponential(loss),
        means.get("kl_divergence"),
        means.get("same_top"),
        None if of_reference_loss is None else _exponential(of_reference_loss),
    )


def compare_embeddings(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], *, reference: nn.Module
) -> EmbeddingScores:
    """How near an encoder's embeddings of windows are to a reference's.

    The embedding of a window is the mean of the last hidden states of its tokens, padding left out, in float32: what
    sentence encoders such as MiniLM are used by. Windows count alike, whatever their lengths.

    Args:
        model: whose output has ``last_hidden_state`` [B, L, features], or is that tensor, or a tuple that begins with
            it.
        batches: as of :func:`evaluate`.
        reference: the model to compare with.

    Raises:
        ValueError, TypeError: for a bad argument, hidden states of another shape or that are not numbers.
    """
    _check_module("compare_embeddings", "model", model)
    _check_module("compare_embeddings", "reference", reference)
    cosines: list[float] = []
    with evaluation_mode(model), evaluation_mode(reference):
        for where, batch in _checked("compare_embeddings", batches):
            got = _embeddings(model, batch, f"{where}: the model")
            expected = _embeddings(reference, batch, f"{where}: the reference")
            if got.shape != expected.shape:
                raise ValueError(
                    f"{where}: expected model and reference to have embeddings of one length, but got "
                    f"{got.shape[-1]} and {expected.shape[-1]}"
                )
            cosines += nn.functional.cosine_similarity(got, expected, dim=-1).tolist()
    if not cosines:
        raise ValueError("compare_embeddings: expected a window, but got none")
    return EmbeddingScores(len(cosines), _ratio(cosines, [1] * len(cosines)), min(cosines))


def _ratio(sums: Iterable[float], counts: Iterable[int]) -> Estimate:
    """The mean over predictions, and its standard error over windows."""
    of_sums, of_counts = (torch.tensor(list(values), dtype=torch.float64) for values in (sums, counts))
    windows, total = len(of_counts), float(of_counts.sum())
    mean = float(of_sums.sum()) / total
    if windows == 1 or not math.isfinite(mean):
        return Estimate(mean, None)
    squares = float((of_sums - mean * of_counts).square().sum())
    return Estimate(mean, math.sqrt(windows / (windows - 1) * squares) / total)


def _exponential(loss: Estimate) -> Estimate:
    """The exponential of an estimate; beyond what a float holds it is infinite."""
    try:
        value = math.exp(loss.value)
    except OverflowError:
        value = math.inf
    error = loss.standard_error
    return Estimate(value, None if error is None or not math.isfinite(value) else value * error)


def _window_sums(logits: Tensor, targets: Tensor, reference: Tensor | None) -> list[float]:
    """Sums over the predictions of a window: the loss, and with a reference KL divergence, equal top tokens, its loss.

    Args:
        logits: [n, V] of the model.
        targets: [n], the tokens that came.
        reference: [n, V].
    """
    sums = torch.zeros(1 if reference is None else 4, dtype=torch.float64)
    step = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        ln_q = torch.log_softmax(logits[part].float(), dim=-1)
        token = targets[part, None].to(ln_q.device)
        values = [-ln_q.gather(1, token)]
        if reference is not None:
            ln_p = torch.log_softmax(reference[part].to(ln_q.device).float(), dim=-1)
            p = ln_p.exp()
            # A token of probability 0 adds nothing, also where both logarithms are infinite.
            divergence = torch.where(p > 0, p * (ln_p - ln_q), 0).sum(dim=-1)
            values += [divergence, ln_p.argmax(dim=-1) == ln_q.argmax(dim=-1), -ln_p.gather(1, token)]
        sums += torch.stack([value.double().sum() for value in values]).cpu()
    return sums.tolist()


def _counting(batch: Batch) -> Tensor:
    """[B, L - 1], whether the prediction of tokens 1 to L - 1 of each row counts."""
    mask: Tensor = batch["attention_mask"].bool()
    return mask[:, 1:] & mask[:, :-1]


def _logits(model: nn.Module, batch: Batch, where: str) -> list[Tensor]:
    """The logits [n, V] of each row's predictions."""
    logits = _output(model, batch, "logits", where)
    rows, length = batch["input_ids"].shape
    if logits.dim() != 3 or logits.shape[:2] != (rows, length):
        raise ValueError(
            f"{where}: expected logits to have shape [{rows}, {length}, vocabulary], but got shape {list(logits.shape)}"
        )
    counting = _counting(batch).to(logits.device)
    chosen = [row[:-1][counts] for row, counts in zip(logits, counting, strict=True)]
    for row, of_row in enumerate(chosen):
        if bool((of_row.isnan() | (of_row == math.inf)).any()):
            raise ValueError(f"{where}: expected logits of row {row + 1} to be numbers, but got nan or infinity")
    return chosen


def _embeddings(model: nn.Module, batch: Batch, where: str) -> Tensor:
    """The mean hidden state of each row, float32 [B, features]."""
    hidden = _output(model, batch, "last_hidden_state", where)
    mask = batch["attention_mask"]
    if hidden.dim() != 3 or hidden.shape[:2] != mask.shape:
        raise ValueError(
            f"{where}: expected last_hidden_state to have shape [{mask.shape[0]}, {mask.shape[1]}, features], but got "
            f"shape {list(hidden.shape)}"
        )
    kept = mask.bool()[:, :, None].to(hidden.device)
    if not bool((hidden.isfinite() | ~kept).all()):
        raise ValueError(f"{where}: expected last_hidden_state to be finite, but got nan or infinity")
    mean: Tensor = torch.where(kept, hidden.float(), 0).sum(dim=1) / kept.sum(dim=1)
    return mean.cpu()


def _output(model: nn.Module, batch: Batch, name: str, where: str) -> Tensor:
    """What the model gives under a name, or as its only or first output."""
    devices = (tensor.device for tensor in (*model.parameters(), *model.buffers()))
    device = next((one for one in devices if one.type != "meta"), torch.device("cpu"))  # meta: lazy.py reads it then
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    with torch.inference_mode():
        output: Any = model(**moved)
    outputs: Mapping[str, Any] = output if isinstance(output, Mapping) else {name: getattr(output, name, output)}
    found = outputs.get(name)
    first: object = found[0] if isinstance(found, tuple) and found else found
    if not isinstance(first, Tensor):
        got = ", ".join(map(str, outputs)) if isinstance(output, Mapping) else type(first).__name__
        raise TypeError(f"{where}: expected an output {name}, but got {got}")
    return first


def _check_module(function: str, name: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: expected {name} to be a torch.nn.Module, but got {type(module).__name__}")


def _checked(function: str, batches: Iterable[Tensor | Mapping[str, Any]]) -> Iterator[tuple[str, Batch]]:
    """Batches with a mask, and where each stands."""
    for number, batch in enumerate(batches, start=1):
        where = f"{function}: batch {number}"
        arguments = given_batch(batch, where).arguments
        if "input_ids" not in arguments:
            raise ValueError(f"{where}: expected input_ids, but got {', '.join(arguments)}")
        yield where, arguments


def _digest(batch: Batch) -> bytes:
    """What tells batches apart."""
    digest = hashlib.blake2b()
    for name, value in sorted(batch.items()):
        digest.update(repr((name, getattr(value, "shape", value), getattr(value, "dtype", None))).encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
