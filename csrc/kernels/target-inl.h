#pragma once

// The instruction set that this compilation is for. CMakeLists.txt defines macros for each object:
// MINIQUANT_KERNEL_ISA, the name of an instruction set or unit; MINIQUANT_VECTOR_HEADER, its file of vector operations;
// MINIQUANT_BF16_HEADER, that of a unit. An editor that opens one of these headers alone sees the baseline.
//
// All *-inl.h files are compiled once per instruction set. Their definitions are in an anonymous namespace within a
// namespace named after the instruction set. With internal linkage, the linker cannot replace a function elsewhere by
// the same function compiled for a newer instruction set. For the same reason no inline function of the standard
// library is called. scripts/check_symbols.py checks the objects.

#ifndef MINIQUANT_KERNEL_ISA
#define MINIQUANT_KERNEL_ISA baseline
#endif
#ifndef MINIQUANT_VECTOR_HEADER
#define MINIQUANT_VECTOR_HEADER "kernels/vector_baseline-inl.h"
#endif
#ifndef MINIQUANT_BF16_HEADER
#define MINIQUANT_BF16_HEADER "kernels/bf16_emulated-inl.h"
#endif

#define MINIQUANT_INLINE inline __attribute__((always_inline))

/// For copies next to a kernel's loops: inlined, they would take registers from the loops.
#define MINIQUANT_NOINLINE __attribute__((noinline))
