// TMA's view of global memory: tensor maps, and boxes cut into chunks of 16 bytes.
#pragma once

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

#include "failure.h"

namespace fastattn::emulator {

constexpr int kMaxRank = 5;
constexpr int kTransferChunk = 16;  // bytes

// What a copy moves between shared memory and a box of a tensor.
struct Transfer {
  void* shared;
  unsigned char* global;  // of the element of coordinates 0
  int rank, element_bytes;
  bool swizzled;
  int64_t sizes[kMaxRank], strides[kMaxRank];  // strides in bytes
  int box[kMaxRank], coordinates[kMaxRank];

  int64_t bytes() const;
};

// 16 bytes of a transfer. Bytes `first` to `last` of them are in the tensor, the others are 0.
struct TransferChunk {
  void* shared;
  unsigned char* global;  // of byte 0
  int first, last;
};

// By a tensor map; fails unless it is one, of this rank, and shared memory is aligned.
Transfer transfer_of(const void* shared, const CUtensorMap* map, int rank, const int* coordinates,
                     const Where& where);
// In a row.
Transfer transfer_of(const void* shared, const void* global, int bytes, const Where& where);

// The chunks of a transfer, in the order of its elements.
class TransferChunks {
 public:
  explicit TransferChunks(const Transfer& transfer) : transfer_(transfer) {}
  bool next(TransferChunk* chunk);

 private:
  const Transfer& transfer_;
  int64_t offset_ = 0;
};

}  // namespace fastattn::emulator
