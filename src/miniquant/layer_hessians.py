"""What the tokens that batches give to a layer say: Hessians, errors of layers before, and how large the sample is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from miniquant.correction import Correction, Errors
from miniquant.hessian import HessianAccumulator
from miniquant.ranks import Ranks
from miniquant.token_weights import TokenWeights, weigh
from miniquant.walk import Given

# Fewer held-out tokens than these say too little about a layer.
FEWEST_HELD_OUT = 16
# Layers are judged by so many of their rows: with all, judging would take longer than quantizing.
JUDGED_ROWS = 256
# Where the CPU has a unit for 16 bits, a pass over a Hessian takes as long as the products of a thousand such tokens.
# So smaller batches, as those of an expert, are added so many tokens at a time.
TOKENS_TOGETHER = 1024


def judged_rows(rows: int) -> Tensor:
    """Evenly spaced rows, by which a layer is judged."""
    return torch.arange(min(rows, JUDGED_ROWS)) * rows // min(rows, JUDGED_ROWS)


def _parts_in_halves(tokens: int, before: Sequence[int]) -> list[tuple[int, slice]]:
    """Which half each part of a batch goes to, as in a :class:`HessianAccumulator`.

    A batch that is longer than all before is cut so that both have as many tokens, any other goes to the half that has
    fewer.

    Args:
        tokens: of the batch.
        before: tokens of either half so far, or of all where there are no halves.
    """
    lighter, cut = before.index(min(before)), tokens
    if len(before) == 2 and tokens > sum(before):
        cut = (tokens + max(before) - min(before) + 1) // 2
    return [(lighter, slice(cut)), *([(1 - lighter, slice(cut, None))] if cut < tokens else [])]


def _parts_of_ranks(ranks: Ranks, inputs: Sequence[Given]) -> list[list[tuple[int, slice]]]:
    """The same for each batch of this rank, as if one process had the batches of all in their order."""
    mine = [(given.batch * ranks.count + ranks.rank, _tokens_that_count(given)) for given in inputs]
    sums, parts_of = [0, 0], {}
    for number, tokens in sorted(batch for of_rank in ranks.gathered(mine) for batch in of_rank):
        parts_of[number] = _parts_in_halves(tokens, sums)
        for half, part in parts_of[number]:
            sums[half] += len(range(*part.indices(tokens)))
    return [parts_of[number] for number, _ in mine]


def _tokens_that_count(given: Given) -> int:
    tokens = given.tokens()
    return int(tokens.shape[:-1].numel() if given.mask is None else given.mask.sum())


class _DeviceSums:
    """X^T diag(w) X of either half of the tokens on the device where inputs are, for a :class:`HessianAccumulator`."""

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device, *, halves: bool) -> None:
        self._sums = torch.zeros(2 if halves else 1, columns, columns, dtype=dtype, device=device)
        self._tokens = [0] * len(self._sums)
        self._weights = torch.zeros(2, len(self._sums), dtype=torch.float64, device=device)

    def update(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        parts: list[tuple[int, slice]] | None = None,
    ) -> None:
        rows = inputs.flatten(0, -2) if mask is None else inputs[mask]
        of_rows = None if weights is None else weights.flatten() if mask is None else weights[mask]
        if not bool(rows.isfinite().all()):
            raise ValueError("expected inputs to be finite, but got others")
        for number, cut_out in _parts_in_halves(len(rows), self._tokens) if parts is None else parts:
            part = rows[cut_out].to(self._sums.dtype)
            if of_rows is not None:
                part = part * of_rows[cut_out, None].sqrt().to(part.dtype)
            self._sums[number].addmm_(part.T, part)
            self._tokens[number] += len(part)
            for power, row in enumerate(self._weights, start=1):
                total = float(len(part)) if of_rows is None else of_rows[cut_out].double().pow(power).sum()
                row[number] += total

    def accumulator(self) -> HessianAccumulator:
        accumulator = HessianAccumulator(self._sums.shape[-1], self._sums.dtype, halves=len(self._tokens) == 2)
        state = {"sums": self._sums.cpu(), "tokens": torch.tensor(self._tokens), "weights": self._weights.cpu()}
        accumulator.load_state_dict(state)
        return accumulator


def accumulated(
    inputs: Sequence[Given],
    columns: int,
    dtype: torch.dtype,
    weighing: "Weighing",
    *,
    halves: bool,
    ranks: Ranks | None = None,
    weight: Callable[[], Tensor] | None = None,
) -> tuple[HessianAccumulator, "_Sample", Errors | None]:
    """The Hessian of what batches give to a layer, how many tokens the sample amounts to, and errors of layers before.

    The last are None where not every batch runs in the float model too, and have none of a stream where it is not known
    in every batch. With ranks, which have to be here together, halves are those of all batches of the run; sums are of
    this rank's. `weight` gives that of the layer; without it there are no errors.
    """
    on_device: _DeviceSums | None = None
    accumulator = HessianAccumulator(columns, dtype, halves=halves)
    batches = _Batches(accumulator)
    parts = None
    if ranks is not None and halves:
        parts = _parts_of_ranks(ranks, inputs)
    sample = _Sample()
    errors = None if weight is None else _no_errors(inputs, columns, dtype)
    for number, given in enumerate(inputs):
        tokens = given.tokens()
        if tokens.shape[-1] != columns:
            raise ValueError(f"expected inputs of {columns} columns, but got shape {list(tokens.shape)}")
        if not tokens.numel():
            continue
        of_batch = None if parts is None else parts[number]
        with _naming(given.batch):
            weights, sampled = weighing.of(given, tokens)
        if tokens.device.type == "cpu":
            batches.add(given.batch, tokens, given.mask, weights, of_batch)
        with _naming(given.batch):
            if tokens.device.type != "cpu":
                on_device = on_device or _DeviceSums(columns, dtype, tokens.device, halves=halves)
                on_device.update(tokens, given.mask, weights, of_batch)
            sample.add(tokens, given.mask, sampled)
            if errors is not None and weight is not None:
                _add_errors(errors, given, tokens, weights, weight)
    batches.finish()
    if on_device is None:
        return accumulator, sample, errors
    elsewhere = on_device.accumulator()
    if accumulator.tokens:
        elsewhere.merge(accumulator)
    return elsewhere, sample, errors


@contextmanager
def _naming(batch: int) -> Iterator[None]:
    """What is wrong with a batch names it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"batch {batch}: {error}") from error


def _no_errors(inputs: Sequence[Given], columns: int, dtype: torch.dtype) -> Errors | None:
    """Sums of errors for what batches give to a layer."""
    if not inputs or any(given.original is None for given in inputs):
        return None
    streams = [given.stream for given in inputs if given.stream is not None and given.original_stream is not None]
    return Errors.empty(columns, dtype, streams[0].shape[-1] if len(streams) == len(inputs) else None)


def _add_errors(
    errors: Errors, given: Given, tokens: Tensor, weights: Tensor | None, weight: Callable[[], Tensor]
) -> None:
    """Adds a batch."""
    original = given.original_tokens()
    if original is not None:
        errors.add_inputs(original, tokens, given.mask, weights, weight)
    if errors.stream is not None and given.stream is not None and given.original_stream is not None:
        errors.stream.update(given.original_stream, given.stream, tokens, given.mask, weights)


class _Part(NamedTuple):
    """Tokens of a batch that one half of a Hessian is given."""

    batch: int
    rows: Tensor  # [T, K]
    weights: Tensor | None  # [T]


class _Batches:
    """Adds batches on the CPU to an accumulator, small ones of 16 bits several at a time."""

    def __init__(self, accumulator: HessianAccumulator) -> None:
        self._accumulator = accumulator
        self._tokens = [0] * (2 if accumulator.halves else 1)
        self._waiting: list[list[_Part]] = [[] for _ in self._tokens]

    def add(
        self,
        batch: int,
        tokens: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        parts: Sequence[tuple[int, slice]] | None = None,
    ) -> None:
        """Adds a batch; `parts` says which half is given what, without it they are as of the accumulator."""
        rows = tokens.flatten(0, -2) if mask is None else tokens[mask]
        of_rows = None if weights is None else weights.flatten() if mask is None else weights[mask]
        for half, cut in _parts_in_halves(len(rows), self._tokens) if parts is None else parts:
            part = _Part(batch, rows[cut], None if of_rows is None else of_rows[cut])
            waiting = self._waiting[half]
            if waiting and not _go_together(waiting[0], part):
                self._update(half)
            self._tokens[half] += len(part.rows)
            self._waiting[half].append(part)
            tokens_that_wait = sum(len(one.rows) for one in self._waiting[half])
            if part.rows.element_size() > 2 or tokens_that_wait >= TOKENS_TOGETHER:
                self._update(half)

    def finish(self) -> None:
        """Adds what waits yet."""
        for half in range(len(self._waiting)):
            self._update(half)

    def _update(self, half: int) -> None:
        """Adds what waits for one half.

        Raises:
            ValueError, TypeError: that of the accumulator, with the batch.
        """
        waiting, self._waiting[half] = self._waiting[half], []
        if not waiting:
            return
        try:
            _add_to_half(self._accumulator, half, waiting)
        except (ValueError, TypeError):
            for part in waiting:
                with _naming(part.batch):
                    _add_to_half(self._empty(), 0, [part])
            with _naming(waiting[-1].batch):
                raise

    def _empty(self) -> HessianAccumulator:
        """One without tokens."""
        return HessianAccumulator(self._accumulator.in_features, self._accumulator.dtype)


def _go_together(one: _Part, other: _Part) -> bool:
    """Whether two parts can be added as one."""
    return one.rows.dtype == other.rows.dtype and (one.weights is None) == (other.weights is None)


def _add_to_half(accumulator: HessianAccumulator, half: int, parts: Sequence[_Part]) -> None:
    """Adds tokens of one or more batches to a half of an accumulator, or to one without halves."""
    rows = parts[0].rows if len(parts) == 1 else torch.cat([part.rows for part in parts])
    given = [part.weights for part in parts if part.weights is not None]
    weights = None if not given else given[0] if len(given) == 1 else torch.cat(given)
    if accumulator.halves:
        accumulator.update_half(half, rows, token_weights=weights)
    else:
        accumulator.update(rows, token_weights=weights)


class Weighing(NamedTuple):
    """How a layer's tokens are weighed (token_weights.py).

    Attributes:
        scheme: which weights.
        causal: whether tokens are in causal order.
        gradients: |g|^2 of the tokens of each batch, at the output of the layer; None where there are none.
    """

    scheme: TokenWeights
    causal: bool
    gradients: Sequence[Tensor] | None = None

    def of(self, given: Given, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """As of :func:`miniquant.token_weights.weigh`."""
        gradients = None if self.gradients is None else self.gradients[given.batch]
        if gradients is not None and gradients.shape != tokens.shape[:-1]:
            raise ValueError(
                f"expected gradients of tokens of shape {list(tokens.shape[:-1])}, but got shape "
                f"{list(gradients.shape)}"
            )
        return weigh(tokens, given.mask, self.scheme, causal=self.causal, gradients=gradients, relative_to=given.stream)


@dataclass
class _Sample:
    """The sums of the weights that tokens have as a sample, and of their squares."""

    weights: float = 0.0
    squares: float = 0.0

    def add(self, tokens: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
        """Adds the tokens of a batch."""
        if weights is None:
            count = float(tokens.shape[:-1].numel() if mask is None else mask.sum())
            self.weights += count
            self.squares += count
        else:
            counted = (weights if mask is None else weights[mask.to(weights.device)]).double()
            self.weights += float(counted.sum())
            self.squares += float(counted.square().sum())

    def merge(self, other: "_Sample") -> None:
        self.weights += other.weights
        self.squares += other.squares

    @property
    def effective_tokens(self) -> float:
        """(sum w)^2 / sum w^2, at least 1."""
        return max(1.0, self.weights**2 / self.squares) if self.squares else 1.0


@dataclass
class LayerHessians:
    """What a layer's tokens say: those of calibration, and those held out."""

    calibration: HessianAccumulator
    held_out: HessianAccumulator
    sample: _Sample  # of calibration
    errors: Errors | None = None  # of calibration
    held_out_errors: Errors | None = None
    _corrections: dict[float, Correction] = field(default_factory=dict)  # by ridge

    @classmethod
    def empty(cls, columns: int, dtype: torch.dtype) -> "LayerHessians":
        """Of no tokens; `dtype` is that of the sums."""
        return cls(HessianAccumulator(columns, dtype, halves=True), HessianAccumulator(columns, dtype), _Sample())

    def merge(self, other: "LayerHessians") -> None:
        """Adds the tokens of another layer with as many columns; not their errors."""
        for mine, others in ((self.calibration, other.calibration), (self.held_out, other.held_out)):
            if others.tokens:
                mine.merge(others)
        self.sample.merge(other.sample)

    def sum_over(self, ranks: Ranks, weight: Callable[[], Tensor], *, has_held_out: bool) -> None:
        """Adds the tokens of all ranks.

        Args:
            ranks: of the run.
            weight: gives the layer's.
            has_held_out: whether batches of this one are held out.
        """
        for accumulator in (self.calibration, self.held_out):
            accumulator.merge_over(ranks.sum)
        lacks = [  # on any rank
            self.errors is None,
            any(
                errors is None or errors.stream is None for errors in (self.errors, self.held_out_errors or self.errors)
            ),
            has_held_out and self.held_out_errors is None,
        ]
        multiplied = any(errors is not None and errors.multiplied for errors in (self.errors, self.held_out_errors))
        said = torch.tensor(
            [self.sample.weights, self.sample.squares, has_held_out, *lacks, multiplied], dtype=torch.float64
        )
        ranks.sum(said)
        weights, squares, judging, without_errors, without_stream, without_held_out, any_multiplied = said.tolist()
        self.sample = _Sample(weights, squares)
        if without_errors or self.errors is None:
            self.errors = self.held_out_errors = None
            return
        is_judged = judging and not without_held_out
        self.held_out_errors = (self.held_out_errors or self.errors.like()) if is_judged else None
        for errors in filter(None, (self.errors, self.held_out_errors)):
            if without_stream:
                errors.stream = None
            if any_multiplied:
                errors.multiply(weight())
            errors.merge_over(ranks.sum)

    def corrected(
        self,
        weight: Tensor,
        ridge: float,
        part: float,
        stream_part: float,
        decided: Callable[[Callable[[], bool]], bool],
    ) -> tuple[Tensor, list[str]]:
        """The weight that makes up for errors of layers before, and what is not corrected of them.

        Args:
            weight: [N, K].
            ridge: of the layer.
            part: of the errors of its inputs.
            stream_part: of the errors of the stream that it writes to.
            decided: says whether a target gains on held-out tokens, with a function that finds out.
        """
        if self.errors is None:
            return weight, []
        if ridge not in self._corrections:
            self._corrections[ridge] = Correction(self.errors, self.calibration.hessian, ridge)
        attempts = [(part, stream_part)] if stream_part and self.errors.stream is not None else []
        attempts += [(part, 0.0)] if part else []
        notes: list[str] = []
        for parts in attempts:
            target = self._corrections[ridge].of(weight, *parts)
            if decided(partial(self._gains, weight, target, *parts)):
                break
            whose = "of the residual stream" if parts[1] else "of earlier layers"
            notes.append(f"errors {whose} are not corrected: on held-out tokens that loses more than it gains")
        else:
            target = weight
        if self.errors.stream is not None:  # no other layer has these inputs
            self._corrections.clear()
        return target, notes

    def _gains(self, weight: Tensor, target: Tensor, part: float, stream_part: float) -> bool:
        """Whether ||u + W x - (v + W' y)||^2 is at most ||u + W x - (v + W y)||^2 on held-out tokens, in some rows.

        Of what is not corrected, u - v or x - y, nothing is counted.
        """
        if self.held_out_errors is None or self.held_out.tokens < FEWEST_HELD_OUT:
            return True
        some = judged_rows(len(weight))
        change = (target[some] - weight[some]).double()
        wanted = self.held_out_errors.wanted(weight, float(part > 0), float(stream_part > 0), some)
        gained = 2 * wanted - change @ self.held_out.hessian().double()
        return float((gained * change).sum()) >= 0
