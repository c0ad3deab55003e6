// A window of a resized image.
#pragma once
#include "convnext_deploy.h"
#include "kernels.h"

namespace cnxt {

// The arguments were checked.
void resample(const Kernels &kernels, const cnxt_resize &asked, const uint8_t *pixels, uint8_t *out);

}  // namespace cnxt
