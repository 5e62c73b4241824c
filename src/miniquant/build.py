"""Properties of the loaded library."""

import torch


def instruction_set() -> str:
    """The instruction set of the kernels that run: "baseline", "avx2", "avx512", "neon".

    It is the most capable one that the CPU supports, unless ``MINIQUANT_ISA`` in the environment names another.

    Raises:
        ValueError: if ``MINIQUANT_ISA`` names an instruction set or unit that is unknown or that the CPU does not
            support.
    """
    return str(torch.ops.miniquant.instruction_set())


def bfloat16_unit() -> str:
    """The unit that computes Hessians of bfloat16 and float16 inputs in float32.

    "amx_bf16", "avx512_bf16", "neon_bf16" or "none"; with "none" the kernels of :func:`instruction_set` do. It is the
    most capable one that the CPU and the operating system support and that multiplies faster than float32
    (``avx512_bf16`` does not on CPUs of Intel). ``MINIQUANT_ISA`` may name one; where it names an instruction set there
    is none. A unit multiplies exactly and sums in float32, so the sums differ from those without it by rounding only.

    Raises:
        ValueError: as :func:`instruction_set`.
    """
    return str(torch.ops.miniquant.bfloat16_unit())
