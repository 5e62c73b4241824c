"""Properties of the loaded library."""

import torch


def instruction_set() -> str:
    """The instruction set of the kernels that run: "baseline", "avx2", "avx512".

    It is the most capable one that the CPU supports, unless ``MINIQUANT_ISA`` in the environment names another.

    Raises:
        ValueError: if ``MINIQUANT_ISA`` names an instruction set that is unknown or that the CPU does not support.
    """
    return str(torch.ops.miniquant.instruction_set())
