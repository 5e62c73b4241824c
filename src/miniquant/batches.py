"""Batches: those that calibrate and those held out, and the share of a rank."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from miniquant.calibration import Calibration
from miniquant.ranks import RankError, Ranks

# The part of the tokens that is held out where nobody says otherwise.
HELD_OUT = 0.05
# Batches are held out only where that takes no more than this part of the tokens from calibration.
MOST_HELD_OUT = 0.25

# Of a batch that is nothing but sequences of tokens.
SEQUENCES = frozenset({"input_ids", "attention_mask", "token_type_ids"})


def all_batches(
    calibration: Calibration | Iterable[Any], held_out: float | Iterable[Any] | None
) -> tuple[list[Any], int, list[str]]:
    """Batches, those held out last, how many are held out, and notes."""
    notes: list[str] = []
    if isinstance(calibration, Calibration):
        held_out = (calibration.held_out or None) if held_out is None else held_out
        notes += calibration.notes
    batches = listed_batches(
        "calibration", calibration.batches if isinstance(calibration, Calibration) else calibration
    )
    part, kept = held_out_of(HELD_OUT if held_out is None else held_out)
    if not batches:
        raise ValueError("quantize_model: expected calibration to have batches, but got none")
    count, note = (len(kept), None) if kept else _held_out_batches([_size(batch) for batch in batches], part)
    return batches + kept, count, [*notes, *(() if note is None else (note,))]


def share_of(
    ranks: Ranks, batches: list[Any], held_out: int, masks: Sequence[Tensor | None] | None
) -> tuple[list[Any], int, Sequence[Tensor | None] | None]:
    """This rank's batches, those held out last, how many are held out, and their masks.

    Held-out batches go on where the others end, so that all ranks have as many. What is left of them then, fewer than
    there are ranks, is cut into parts; batches for calibration are not, since their parts would come to other halves.
    """
    first = len(batches) - held_out
    if first < ranks.count:
        raise RankError(
            f"quantize_model: expected a calibration batch for each of {ranks.count} ranks, but got {first} (smaller "
            "batches can be shared)"
        )
    all_masks = [None] * len(batches) if masks is None else list(masks)
    whole = len(batches) - len(batches) % ranks.count
    mine = []  # number, batch, mask
    for number, (batch, mask) in enumerate(zip(batches, all_masks, strict=True)):
        if number >= max(whole, first) and _has_only_sequences(batch, mask):
            part = _sequences_of_rank(ranks, batch, mask)
            mine += [(number, *part)] if part is not None else []
        elif number % ranks.count == ranks.rank:
            mine.append((number, batch, mask))
    kept = sum(number >= first for number, *_ in mine)
    return [batch for _, batch, _ in mine], kept, None if masks is None else [mask for *_, mask in mine]


def _has_only_sequences(batch: Any, mask: Tensor | None) -> bool:
    """Whether a batch is sequences of tokens and nothing else, so that it can be cut between them."""
    if not isinstance(batch, Mapping) or not SEQUENCES.issuperset(batch) or "input_ids" not in batch:
        return False
    tensors = [*batch.values(), *([] if mask is None else [mask])]
    return all(isinstance(one, Tensor) and one.dim() == 2 for one in tensors) and len({*map(len, tensors)}) == 1


def _sequences_of_rank(
    ranks: Ranks, batch: Mapping[str, Tensor], mask: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None] | None:
    """This rank's part of a batch of sequences, and of its mask; None where it has none."""
    part = {name: tensor.tensor_split(ranks.count)[ranks.rank] for name, tensor in batch.items()}
    if not len(part["input_ids"]):
        return None
    return part, None if mask is None else mask.tensor_split(ranks.count)[ranks.rank]


def listed_batches(name: str, given: Any) -> list[Any]:
    """The batches of an argument.

    Raises:
        TypeError: where it is one batch, or none.
    """
    if isinstance(given, (Tensor, Mapping, str)) or not isinstance(given, Iterable):
        raise TypeError(
            f"quantize_model: expected {name} to be an iterable of batches, but got one {type(given).__name__} "
            "(for one batch pass a list of it)"
        )
    return list(given)


def held_out_of(given: Any) -> tuple[float, list[Any]]:
    """The part of the tokens that is held out, or the batches that are.

    Raises:
        ValueError, TypeError: for anything else.
    """
    if isinstance(given, bool) or (isinstance(given, (int, float)) and not 0 <= given <= MOST_HELD_OUT):
        raise ValueError(
            f"quantize_model: expected held_out to be batches or a number from 0 to {MOST_HELD_OUT}, but got {given!r}"
        )
    return (float(given), []) if isinstance(given, (int, float)) else (0.0, listed_batches("held_out", given))


def _size(batch: Any) -> int:
    """About how many tokens a batch has: enough to tell which batches are held out."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return int((mask != 0).sum())
        values = list(batch.values())
    else:
        values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    ids = [tensor for tensor in tensors if not tensor.is_floating_point()]
    return ids[0].numel() if ids else tensors[0].shape[0] if tensors else 1


def _held_out_batches(sizes: Sequence[int], part: float) -> tuple[int, str | None]:
    """How many of the last batches are held out, and a note where none is though it is asked for."""
    total = sum(sizes)
    if part == 0:
        return 0, None
    count = held = 0
    while held < part * total:
        count += 1
        held += sizes[-count]
    if held > MOST_HELD_OUT * total or count == len(sizes):
        return 0, (
            f"no batch is held out, so no layer is judged: of {len(sizes)} batches the last {count} would be "
            f"{held / max(total, 1):.0%} of the tokens (smaller batches can be held out)"
        )
    return count, None
