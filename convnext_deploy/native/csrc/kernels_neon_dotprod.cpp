#include "kernels_body.h"

KERNELS(neon_dotprod)
