#include "tensor_maps.h"

#include <string.h>

#include <algorithm>

#include "shared_memory.h"

namespace fastattn::emulator {
namespace {

constexpr uint32_t kMagic = 0x3a7e4501;
constexpr size_t kMapAlignment = 64;

// What a map holds. As on a GPU it means nothing to others.
struct Encoded {
  uint32_t magic;
  uint8_t rank, element_bytes;
  bool swizzled;
  uint64_t data;
  uint64_t sizes[kMaxRank], strides[kMaxRank - 1];
  uint32_t box[kMaxRank];
};
static_assert(sizeof(Encoded) <= sizeof(CUtensorMap));

bool is_valid(const Encoded& map, const cuuint32_t* steps) {
  if (map.rank < 1 || map.rank > kMaxRank || map.data % 16 != 0) return false;
  for (int i = 0; i < map.rank; ++i) {
    if (map.sizes[i] == 0 || map.sizes[i] > uint64_t{1} << 32) return false;
    if (map.box[i] == 0 || map.box[i] > 256 || steps[i] != 1) return false;
  }
  for (int i = 0; i + 1 < map.rank; ++i) {
    // NOTE: whether a GPU takes strides of 0 is not written anywhere.
    if (map.strides[i] == 0 || map.strides[i] % 16 != 0 || map.strides[i] >> 40 != 0) return false;
  }
  const uint32_t row = map.box[0] * map.element_bytes;
  // NOTE: how narrower rows lie under a swizzle is not written anywhere.
  return map.swizzled ? row == 128 : row % 16 == 0;
}

}  // namespace

int64_t Transfer::bytes() const {
  int64_t count = element_bytes;
  for (int i = 0; i < rank; ++i) count *= box[i];
  return count;
}

Transfer transfer_of(const void* shared_pointer, const CUtensorMap* map, int rank,
                     const int* coordinates, const Where& where) {
  if (reinterpret_cast<uintptr_t>(map) % kMapAlignment != 0) {
    fail(where, "a tensor map at %p, which is no multiple of %zu bytes",
         static_cast<const void*>(map), kMapAlignment);
  }
  Encoded encoded;
  memcpy(&encoded, map, sizeof(encoded));
  if (encoded.magic != kMagic) fail(where, "TMA without a tensor map");
  if (encoded.rank != rank) {
    fail(where, "TMA of rank %d with a tensor map of rank %d", rank, encoded.rank);
  }
  const uint32_t alignment = encoded.swizzled ? 1024 : 128;
  if (shared.address_of(shared_pointer) % alignment != 0) {
    fail(where, "TMA at address %u of shared memory, which is no multiple of %u",
         shared.address_of(shared_pointer), alignment);
  }
  Transfer transfer = {};
  transfer.shared = const_cast<void*>(shared_pointer);
  transfer.global = reinterpret_cast<unsigned char*>(encoded.data);
  transfer.rank = rank;
  transfer.element_bytes = encoded.element_bytes;
  transfer.swizzled = encoded.swizzled;
  for (int i = 0; i < rank; ++i) {
    transfer.sizes[i] = static_cast<int64_t>(encoded.sizes[i]);
    transfer.strides[i] =
        i == 0 ? encoded.element_bytes : static_cast<int64_t>(encoded.strides[i - 1]);
    transfer.box[i] = static_cast<int>(encoded.box[i]);
    transfer.coordinates[i] = coordinates[i];
  }
  return transfer;
}

Transfer transfer_of(const void* shared_pointer, const void* global, int bytes,
                     const Where& where) {
  const bool is_aligned =
      shared.address_of(shared_pointer) % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0;
  if (bytes <= 0 || bytes % 16 != 0 || !is_aligned) {
    fail(where,
         "a bulk copy of %d bytes between address %u of shared memory and %p: "
         "all three must be multiples of 16",
         bytes, shared.address_of(shared_pointer), global);
  }
  Transfer transfer = {};
  transfer.shared = const_cast<void*>(shared_pointer);
  transfer.global = static_cast<unsigned char*>(const_cast<void*>(global));
  transfer.rank = transfer.element_bytes = 1;
  transfer.sizes[0] = transfer.box[0] = bytes;
  transfer.strides[0] = 1;
  return transfer;
}

bool TransferChunks::next(TransferChunk* chunk) {
  const Transfer& t = transfer_;
  if (offset_ == t.bytes()) return false;
  const int row_bytes = t.box[0] * t.element_bytes;
  const int64_t column = offset_ % row_bytes;
  int64_t row = offset_ / row_bytes;
  const int64_t start = t.coordinates[0] * int64_t{t.element_bytes} + column;
  int64_t distance = start;
  bool is_inside = true;
  for (int i = 1; i < t.rank; ++i) {
    const int64_t position = t.coordinates[i] + row % t.box[i];
    row /= t.box[i];
    is_inside &= position >= 0 && position < t.sizes[i];
    distance += position * t.strides[i];
  }
  const int64_t end = is_inside ? t.sizes[0] * t.element_bytes : start;
  chunk->first = static_cast<int>(std::clamp<int64_t>(-start, 0, kTransferChunk));
  chunk->last = static_cast<int>(std::clamp<int64_t>(end - start, chunk->first, kTransferChunk));
  chunk->global = t.global + distance;
  uint32_t address = shared.address_of(t.shared) + static_cast<uint32_t>(offset_);
  if (t.swizzled) address = swizzled_128(address);
  chunk->shared = const_cast<void*>(shared.pointer_to(address));
  offset_ += kTransferChunk;
  return true;
}

}  // namespace fastattn::emulator

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  using namespace fastattn::emulator;
  if (rank < 1 || rank > kMaxRank || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Encoded encoded = {};
  encoded.magic = kMagic;
  encoded.rank = static_cast<uint8_t>(rank);
  encoded.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  encoded.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  encoded.data = reinterpret_cast<uintptr_t>(data);
  std::copy(sizes, sizes + rank, encoded.sizes);
  std::copy(strides, strides + rank - 1, encoded.strides);
  std::copy(box, box + rank, encoded.box);
  if (!is_valid(encoded, steps)) return CUDA_ERROR_INVALID_VALUE;
  *map = {};
  memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}
