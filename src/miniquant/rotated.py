"""A model's folder as if it had been saved turned (:mod:`miniquant.rotation`), with nothing written."""

import os
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from miniquant import units
from miniquant.checkpoint import Checkpoint
from miniquant.evaluate import Reference, evaluate
from miniquant.lazy import LazyModel
from miniquant.rotation import Rotation, find_rotation

# Tokens by which a turned model is compared with the model, and the largest divergence of its predictions, nats.
_TOKENS = 128
_LARGEST_DIVERGENCE = 1e-4


class RotatedCheckpoint(Checkpoint):
    """The tensors and the configuration of a folder, turned.

    Args:
        folder: path of the folder.
        trust_remote_code: whether code of the folder may run.

    Raises:
        ValueError: for a model that cannot be turned, or whose tensors are laid out otherwise than its parameters.
        FileNotFoundError, OSError, ImportError: as of :class:`miniquant.lazy.LazyModel`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> None:
        super().__init__(folder)
        before = LazyModel(folder, trust_remote_code=trust_remote_code)
        self._rotation = self._of_tensors(find_rotation(before.model), before)
        self._nbytes = super().nbytes
        head = self._rotation.head
        if head is not None:
            source = self.tensors[self._rotation.turns[head].source]
            self.tensors = MappingProxyType({**self.tensors, head: replace(source, name=head)})
            self.config = {**self.config, "tie_word_embeddings": False}

    def _of_tensors(self, rotation: Rotation, before: LazyModel) -> Rotation:
        """A rotation by names of tensors: all that a parameter is made from are turned as it is.

        Raises:
            ValueError: for tensors whose shapes say that they are not laid out as the parameter.
        """
        turns = {}
        for name, turn in rotation.turns.items():
            gain = None if turn.gain is None else before.source_names(turn.gain)[0]
            is_new = name == rotation.head
            for source in before.source_names(turn.source):
                turns[name if is_new else source] = replace(turn, source=source, gain=gain)
                shape = self.tensors[source].shape
                sides = ((turn.columns, shape[-1]), (turn.rows, shape[-2] if len(shape) > 1 else 0))
                if any(matrix is not None and side % matrix.size for matrix, side in sides):
                    raise ValueError(
                        f"rotation: {self.folder}: expected tensor {source!r} to be laid out as parameter {name!r}, "
                        f"but got shape {list(shape)}"
                    )
        return replace(rotation, turns=turns)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the files."""
        return self._nbytes

    @property
    def note(self) -> str | None:
        """What a person should know of the turned model; None where there is nothing."""
        head = self._rotation.head
        if head is None:
            return None
        return (
            f"rotation: {head}, which is tied to {self._rotation.turns[head].source}, becomes a matrix of its own and "
            f"takes {units.size(self.tensors[head].nbytes)} more (output_embeddings=True quantizes it)"
        )

    def read(self, name: str) -> Tensor:
        """As of the class above; turned tensors in float32 (or float64), not rounded to the dtype of the files."""
        if name in self._rotation.turns:
            return self._rotation.turned(name, super().read)
        return super().read(name)

    def read_dtype(self, name: str) -> torch.dtype:
        """Of what :meth:`read` gives."""
        dtype = super().read_dtype(name)
        return torch.promote_types(dtype, torch.float32) if name in self._rotation.turns else dtype


def check_predictions(
    folder: str | os.PathLike[str],
    checkpoint: RotatedCheckpoint,
    input_ids: Tensor,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Compares predictions of the model of a folder with those of the turned one, both in float32.

    Args:
        folder: of the model.
        checkpoint: the same, turned.
        input_ids: int64 [B, T], of which a few tokens are taken.
        device: where both run, one after the other.
        trust_remote_code: whether code of the folder may run.

    Raises:
        ValueError: where they differ by more than rounding.
    """
    few = input_ids[:1, :_TOKENS]
    with LazyModel(folder, torch.float32, device, trust_remote_code=trust_remote_code) as lazy:
        reference = Reference(lazy.model)
        reference.keep([few])
    with LazyModel(checkpoint, torch.float32, device, trust_remote_code=trust_remote_code) as lazy:
        found = evaluate(lazy.model, [few], reference=reference).kl_divergence
    assert found is not None  # noqa: S101  (there is a reference)
    divergence = found.value
    if not divergence <= _LARGEST_DIVERGENCE:
        raise ValueError(
            f"rotation: {folder}: expected the turned model to predict what the model does, but got a divergence of "
            f"{divergence:.2g} nats on {few.numel()} tokens"
        )
