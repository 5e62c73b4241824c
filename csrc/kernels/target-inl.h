#pragma once

// What this compilation of the kernels is for. CMakeLists.txt defines MINIQUANT_KERNEL_ISA, the name of an instruction
// set, and MINIQUANT_VECTOR_HEADER, its file of vector operations, once per object. An editor that opens one of these
// headers alone sees the baseline.
//
// All *-inl.h files are compiled once per instruction set. What they define is in a namespace named after it, and
// without a name of its own inside that: with internal linkage the linker cannot put code compiled for a newer
// instruction set in the place of the same function elsewhere. For the same reason nothing inline of the standard
// library is called. scripts/check_symbols.py checks the objects.

#ifndef MINIQUANT_KERNEL_ISA
#define MINIQUANT_KERNEL_ISA baseline
#define MINIQUANT_VECTOR_HEADER "kernels/vector_baseline-inl.h"
#endif

#define MINIQUANT_INLINE inline __attribute__((always_inline))

/// For copies beside a kernel's loops: inlined, they take registers from these.
#define MINIQUANT_NOINLINE __attribute__((noinline))
