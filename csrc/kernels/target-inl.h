#pragma once

// The instruction set that this compilation is for. CMakeLists.txt defines two macros for each object:
// MINIQUANT_KERNEL_ISA, the name of an instruction set, and MINIQUANT_VECTOR_HEADER, its file of vector operations. An
// editor that opens one of these headers alone sees the baseline.
//
// All *-inl.h files are compiled once per instruction set. Their definitions are in an anonymous namespace within a
// namespace named after the instruction set. With internal linkage, the linker cannot replace a function elsewhere by
// the same function compiled for a newer instruction set. For the same reason no inline function of the standard
// library is called. scripts/check_symbols.py checks the objects.

#ifndef MINIQUANT_KERNEL_ISA
#define MINIQUANT_KERNEL_ISA baseline
#define MINIQUANT_VECTOR_HEADER "kernels/vector_baseline-inl.h"
#endif

#define MINIQUANT_INLINE inline __attribute__((always_inline))

/// For copies next to a kernel's loops: inlined, they would take registers from the loops.
#define MINIQUANT_NOINLINE __attribute__((noinline))
