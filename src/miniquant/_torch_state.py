"""Modes of torch: those of a thread, for coroutines that take turns on one, and a model's evaluation mode."""
# ruff: noqa: SLF001  (there is no public way to the stacks of modes)

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn, overrides
from torch.utils import _python_dispatch as dispatch


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while (no dropout, no statistics); each module then has the mode that it had."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _autocast_devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu", "cuda") if accelerator is None else tuple(dict.fromkeys(("cpu", "cuda", accelerator.type)))


@dataclass(frozen=True)
class TorchState:
    """Modes of torch of the thread: what :meth:`now` reads, :meth:`set` puts back, but for inference mode.

    Inference mode has no setter, only guards, which put back what they found: whoever sets a state holds one.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    autocast_nesting: int
    function_modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]

    @staticmethod
    def now() -> "TorchState":
        """The modes at this moment."""
        return TorchState(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
                for device in _autocast_devices()
            ),
            torch.is_autocast_cache_enabled(),
            _autocast_nesting(),
            tuple(overrides._get_current_function_mode_stack()),
            tuple(dispatch._get_current_dispatch_mode_stack()),
        )

    def set(self) -> None:
        """Makes them so."""
        now = TorchState.now()
        _set_stack(now.function_modes, self.function_modes, overrides._push_mode, overrides._pop_mode)
        _set_stack(now.dispatch_modes, self.dispatch_modes, dispatch._push_mode, dispatch._pop_mode)
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        for _ in range(_autocast_nesting(), self.autocast_nesting):
            torch.autocast_increment_nesting()
        for _ in range(self.autocast_nesting, _autocast_nesting()):
            torch.autocast_decrement_nesting()


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_stack(
    have: Sequence[Any], wanted: Sequence[Any], push: Callable[[Any], object], pop: Callable[[], object]
) -> None:
    """Makes a stack of modes another one, from where the two differ."""
    common = 0
    while common < min(len(have), len(wanted)) and have[common] is wanted[common]:
        common += 1
    for _ in have[common:]:
        pop()
    for mode in wanted[common:]:
        push(mode)
