// A validated view of a packed network: its pointers lead into the bytes that it was read from.
#pragma once
#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "convnext_deploy.h"
#include "format.h"
#include "kernels.h"

namespace cnxt {

// What is wrong with a file, an argument or the machine: a code of convnext_deploy.h and one line.
struct Failure {
  int code;
  std::string line;
};

// The order of the pairs of steps of every INT8 product, for the kernels that ask for it: found once, by the first
// session with such kernels.
class Orders {
 public:
  void find(const Kernels &kernels, const uint8_t *data, const std::vector<Operation> &operations);
  const uint16_t *of(const Product &product) const;  // NULL: not found, or not INT8

 private:
  using Place = std::pair<uint64_t, uint32_t>;  // of weights in the file, and their inputs

  std::once_flag once;
  std::map<Place, std::vector<uint16_t>> found;  // the longest of those that begin at one place
};

struct Model {
  const uint8_t *data = nullptr;
  size_t bytes = 0;
  bool owned = false;  // our own copy of a file, released when the model is closed
  const Header *header = nullptr;
  std::vector<Operation> operations;

  std::array<uint32_t, 4> channels = {};  // of each stage
  std::array<uint32_t, 4> margin = {};  // pixels that the stage's widest depthwise kernel reaches beyond the map
  uint32_t maps = 0;                    // the stages whose maps are put out, as bits; 0: there is a head
  uint32_t width = 0;                   // of the output vector otherwise
  std::shared_ptr<Orders> orders = std::make_shared<Orders>();

  template <class T>
  const T *tensor(uint64_t offset) const {
    return offset ? reinterpret_cast<const T *>(data + offset) : nullptr;
  }
};

// Throws Failure.
Model read_model(const void *data, size_t bytes);

// What a 3x3 convolution of stride 2 with a padding of 1 makes of a side.
inline size_t half_padded(size_t side) { return (side + 1) / 2; }

// One side of the four maps for images of that side. Pixels that a stride leaves over at the end are dropped.
std::array<uint32_t, 4> map_sides(const Model &model, uint32_t side);

// Multiply-accumulates and the maps' sizes are those of one image of that size.
cnxt_info describe(const Model &model, uint32_t height, uint32_t width);

}  // namespace cnxt
