"""What the library that is loaded was made for."""

import torch


def instruction_set() -> str:
    """The instruction set of the kernels that run: "baseline", "avx2", "avx512".

    The strongest that the CPU has, unless ``MINIQUANT_ISA`` in the environment names another.

    Raises:
        ValueError: where ``MINIQUANT_ISA`` names none that is supported here.
    """
    return str(torch.ops.miniquant.instruction_set())
