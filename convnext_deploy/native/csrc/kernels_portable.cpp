#include "kernels_body.h"

KERNELS(portable)
