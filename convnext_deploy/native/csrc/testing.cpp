// One inner loop by itself, for this project's tests: the structs of kernels.h are filled in by the caller.
#include <cstring>
#include <vector>

#include "convnext_deploy.h"
#include "kernels.h"

extern "C" CNXT_API int cnxt_test_kernel(const char *isa, const char *kernel, const void *arguments, uint32_t columns) {
  const cnxt::Kernels *kernels = cnxt::choose_kernels(isa);
  if (!kernels) return CNXT_BAD_ARGUMENT;
  const auto is = [&](const char *name) { return std::strcmp(kernel, name) == 0; };
  if (is("gemm")) {
    cnxt::Gemm gemm = *static_cast<const cnxt::Gemm *>(arguments);
    const size_t length = cnxt::order_length(gemm.steps);
    std::vector<uint16_t> order(kernels->find_order && gemm.type == cnxt::INT8 ? gemm.last * length : 0);
    for (size_t group = 0; group < order.size() / length; group++)
      kernels->find_order(gemm.weights + group * gemm.steps * 64, gemm.steps / 2, &order[group * length]);
    gemm.order = order.data();
    kernels->gemm(gemm);
  } else if (is("depthwise")) kernels->depthwise(*static_cast<const cnxt::Depthwise *>(arguments));
  else if (is("normalize")) kernels->normalize(*static_cast<const cnxt::Normalize *>(arguments));
  else if (is("scale_rows")) kernels->scale_rows(*static_cast<const cnxt::Normalize *>(arguments), columns);
  else return CNXT_BAD_ARGUMENT;
  return CNXT_OK;
}
