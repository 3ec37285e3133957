// wgmma: what a warpgroup has in flight.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "failure.h"
#include "order.h"

namespace fastattn::emulator {

struct Thread;

// What a thread gives to an instruction: a is null where A is in shared memory.
struct WgmmaOperands {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

// What all threads give alike, since it is part of the instruction.
struct WgmmaKind {
  int columns;
  bool a_along_m, b_along_n;  // contiguous, not along k
  double (*number)(uint16_t bits);
};

// Registers of the threads of a warpgroup are known by where each thread has them.
struct RegistersOfGroup {
  void* of[kGroupThreads];
  int words;  // a thread

  bool are(const RegistersOfGroup& other) const {
    return of[0] == other.of[0] && words == other.words;
  }
  bool overlap(const RegistersOfGroup& other) const;
  void copy_to(std::vector<uint32_t>& values) const;
  bool equal(const std::vector<uint32_t>& values) const;
};

// Products are computed when they are issued, since nobody may touch operands and registers before
// the wait: until then the registers hold NaN, and the operands are marked as being read.
class Products {
 public:
  void begin_block(int group);
  void fence();
  void issue(const WgmmaKind& kind, void* const* operands, const Where& where);
  void commit() {
    ++committed_;
  }
  // All but the newest `pending` groups are done.
  void wait(int pending, const Where& where);
  // None may be in flight.
  void end_thread() const;

 private:
  struct Accumulator {
    RegistersOfGroup registers;
    std::vector<uint32_t> values;
    int group;  // of the last product into it
    Where where;
  };
  struct Product {
    std::vector<const void*> chunks;
    RegistersOfGroup a;  // of no words if it is in shared memory
    std::vector<uint32_t> a_values;
    int group;
    Where where;
  };
  // What registers held at the last fence.
  struct Watched {
    RegistersOfGroup registers;
    std::vector<uint32_t> values;
    bool has_been_fenced;
  };

  Accumulator& accumulator(const WgmmaKind& kind, void* const* operands, const Where& where);
  void require_fence(const char* name, const RegistersOfGroup& registers, const Where& where);
  void read_a(const WgmmaKind& kind, void* const* operands, Product& product);
  void read_b(const WgmmaKind& kind, uint64_t descriptor, Product& product);
  const uint16_t* chunk_at(uint32_t address, Product& product);
  void land(Accumulator& accumulator, const Where& where);

  Actor actor_ = kFirstGroup;
  bool is_fenced_ = false;
  int committed_ = 0;
  Knowledge common_;  // what all threads of the group know
  std::vector<Accumulator> accumulators_;
  std::vector<Product> products_;
  std::vector<Watched> watched_;
};

// Of the warpgroup that a thread is in.
Products& products_of(const Thread& thread);
void begin_products();

}  // namespace fastattn::emulator
