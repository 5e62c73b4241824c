"""A model's folder as if it had been saved turned (:mod:`miniquant.rotation`), with nothing written."""

import os
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from miniquant import units
from miniquant.checkpoint import Checkpoint
from miniquant.lazy import LazyModel
from miniquant.rotation import find_rotation
from miniquant.walk import call

# Tokens by which a turned model is compared with the model, and the largest divergence of its predictions, nats.
_TOKENS = 128
_LARGEST_DIVERGENCE = 1e-4


class RotatedCheckpoint(Checkpoint):
    """The tensors and the configuration of a folder, turned.

    Args:
        folder: path of the folder.
        trust_remote_code: whether code of the folder may run.

    Raises:
        ValueError: for a model that cannot be turned, or whose tensors are not named as its parameters.
        FileNotFoundError, OSError, ImportError: as of :class:`miniquant.lazy.LazyModel`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> None:
        super().__init__(folder)
        before = LazyModel(folder, trust_remote_code=trust_remote_code)
        self._rotation = find_rotation(before.model)
        self._nbytes = super().nbytes
        for name, turn in self._rotation.turns.items():
            if before.source_names(name) != (turn.source,) or not before.is_plain(name):
                raise ValueError(
                    f"rotation: {folder}: expected a tensor named {turn.source!r}, as the parameter of the model, but "
                    f"got {', '.join(before.source_names(name))}"
                )
        if self._rotation.head is not None:
            source = self.tensors[self._rotation.turns[self._rotation.head].source]
            head = {self._rotation.head: replace(source, name=self._rotation.head)}
            self.tensors = MappingProxyType({**self.tensors, **head})
            self.config = {**self.config, "tie_word_embeddings": False}

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

    def predictions(of: str | os.PathLike[str] | Checkpoint) -> Tensor:
        with LazyModel(of, torch.float32, device, trust_remote_code=trust_remote_code) as lazy, torch.no_grad():
            logits: Tensor = call(lazy.model, {"input_ids": few}).logits
            return logits.cpu().double().log_softmax(-1)

    expected, found = predictions(folder), predictions(checkpoint)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean().item()
    if not divergence <= _LARGEST_DIVERGENCE:
        raise ValueError(
            f"rotation: {folder}: expected the turned model to predict what the model does, but got a divergence of "
            f"{divergence:.2g} nats on {few.numel()} tokens"
        )
