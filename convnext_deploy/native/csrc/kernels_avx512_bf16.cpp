#include "kernels_body.h"

KERNELS(avx512_bf16)
