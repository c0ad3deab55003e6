// Everything that is compiled once for each instruction set. Each kernels_<isa>.cpp includes it, with its own flags.
// Nothing here has external linkage but the table: an inline function of the standard library that this unit emitted
// would be merged with that of other units, and could run on a CPU without these instructions.
#pragma once
#include <utility>  // integer_sequence only

#include "depthwise.h"
#include "gemm.h"
#include "kernels.h"
#include "resample.h"
#include "sweep.h"

#if defined(__AVX512BF16__) || MULTIPLIES_MATRICES
#define MULTIPLIES_BF16 true
#else
#define MULTIPLIES_BF16 false
#endif
#if defined(ON_TILES)
#include "gemm_tiles.h"
#define GEMM               tile_gemm
#define MULTIPLY_REGISTERS multiply_tile_registers
#else
#define GEMM               gemm
#define MULTIPLY_REGISTERS multiply_registers
#endif
#if ADDS_IN_16_BITS
#define FIND_ORDER find_order
#else
#define FIND_ORDER nullptr
#endif

#define KERNELS(NAME)                                                                                              \
  namespace cnxt {                                                                                                 \
  const Kernels *NAME##_kernels() {                                                                                \
    static constexpr Kernels table = {#NAME,      MULTIPLIES_BF16, FIND_ORDER,         GEMM, depthwise, normalize, \
                                      scale_rows, sum_squares,     MULTIPLY_REGISTERS, weigh};                     \
    return &table;                                                                                                 \
  }                                                                                                                \
  }
