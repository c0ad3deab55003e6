// The packed network file: a header, operation records of fixed size, then tensors at 64-byte boundaries.
//
// Little endian. A tensor is an offset from the start of the file, 0 where it is absent; its size follows from the
// record. Channels are padded with zeros to a multiple of 16, `padded(C)` below, in every tensor. A product's weights
// are [padded(N) / 16][steps][16][w]: a step is 64 bytes, w = 4 bytes of consecutive inputs for each of 16 outputs
// (4 int8, 2 bf16, or 1 float), so that the same loop multiplies all three types on every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cnxt {

constexpr char MAGIC[8] = {'C', 'N', 'X', 'T', 'P', 'A', 'C', 'K'};
constexpr uint32_t VERSION = 1;
constexpr uint32_t ALIGNMENT = 64;  // bytes
constexpr uint32_t BLOCK = 16;      // channels

// Limits that keep every size below 2^63 and every int32 sum exact: 255 * 127 * 65536 < 2^31.
constexpr uint32_t MAX_CHANNELS = 65536;
constexpr uint32_t MAX_OPERATIONS = 4096;
constexpr uint32_t MAX_KERNEL = 31;

enum Type : uint32_t { FP32 = 0, BF16 = 1, INT8 = 2, TYPES = 3 };
enum Kind : uint32_t { STEM_PATCH = 0, STEM_CONV = 1, BLOCK_OP = 2, DOWNSAMPLE = 3, FEATURES = 4, HEAD = 5, KINDS = 6 };
enum Norm : uint32_t { NO_NORM = 0, LAYERNORM = 1, RMSNORM = 2, SIMPLENORM = 3, NORMS = 4 };
enum Activation : uint32_t { IDENTITY = 0, GELU = 1, GELU_TANH = 2, SILU = 3, RELU = 4, TANH = 5, ACTIVATIONS = 6 };
enum Input : uint32_t { FLOAT32_NCHW = 0, UINT8_NHWC = 1, INPUTS = 2 };
enum Flags : uint32_t { NORM_FIRST = 1 };  // of HEAD: normalize, then pool

constexpr size_t padded(size_t channels) { return (channels + BLOCK - 1) / BLOCK * BLOCK; }
constexpr size_t bytes_of(uint32_t type) { return type == INT8 ? 1 : type == BF16 ? 2 : 4; }

// y[n] = scale[n] * (sum_k w[n][k] q[k] + offset[n]) + bias[n], with q = round((x - shift) / step) + zero_point
// saturated to 0..255 for INT8; without scale and offset, and with q = x, otherwise.
struct Product {
  uint32_t type;
  uint32_t inputs;     // K, a multiple of 16: taps * padded(channels) for convolutions
  uint32_t outputs;    // N
  int32_t zero_point;  // 0..255
  float step;          // of the input's codes, > 0
  float shift;
  uint64_t weights;  // [padded(N) / 16][K * bytes / 4][16][4 / bytes]
  uint64_t bias;     // float [padded(N)]
  uint64_t scale;    // INT8: float [padded(N)]: step times each output's weight scale
  uint64_t offset;   // INT8: int32 [padded(N)]: -zero_point times the sum of each output's weights
};
static_assert(sizeof(Product) == 56);

struct Operation {
  uint32_t kind;
  uint32_t channels;  // of the input map
  uint32_t kernel;    // side of the depthwise kernel
  uint32_t norm;
  uint32_t activation;
  uint32_t flags;
  float eps;  // of the norm
  float grn_eps;
  uint64_t dw_weight;    // BLOCK_OP: float [padded(C) / 16][kernel * kernel][16]
  uint64_t dw_bias;      // float [padded(C)]
  uint64_t norm_weight;  // float [padded(C)] or 0; of FEATURES with a norm: what the map goes through
  uint64_t norm_bias;    // float [padded(C)] or 0
  uint64_t grn_weight;   // BLOCK_OP: float [padded(4C)] or 0
  uint64_t grn_bias;     // float [padded(4C)] or 0
  uint64_t input_mean;   // STEM_CONV: float [padded(C)] or 0, subtracted from the pixels before the padding
  Product a;             // the convolution; expand; HEAD: the hidden linear, or outputs = 0
  Product b;             // project; HEAD: the classifier, or outputs = 0
};
static_assert(sizeof(Operation) == 200);

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t operations;
  uint64_t bytes;  // of the file
  uint32_t input;
  uint32_t in_chans;
  uint32_t reserved[8];  // 0
};
static_assert(sizeof(Header) == 64);

}  // namespace cnxt
