#include "products.h"

#include <string.h>

#include <algorithm>

#include "block.h"
#include "shared_memory.h"

namespace fastattn::emulator {
namespace {

constexpr int kRows = 64, kDepth = 16, kMaxColumns = 256;
constexpr size_t kMostWatched = 64;
constexpr uint32_t kNaN = 0xffffffff;

Products products[kMaxGroups];

// In what vectors every machine has.
using Pair [[gnu::vector_size(16)]] = double;
double a_matrix[kRows][kDepth];
Pair b_matrix[kDepth][kMaxColumns / 2];

const WgmmaOperands& given(void* const* operands, int thread) {
  return *static_cast<const WgmmaOperands*>(operands[thread]);
}

// An operand in shared memory, as its descriptor has it.
struct Descriptor {
  uint32_t start, leading, stride;

  Descriptor(uint64_t bits, const Where& where) {
    const auto field = [&](int shift) {
      return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4;
    };
    start = field(0);
    leading = field(16);
    stride = field(32);
    if (bits >> 62 != 1) {
      fail(where, "wgmma of a layout of type %d: the emulator knows the swizzle of 128 bytes, 1",
           static_cast<int>(bits >> 62));
    }
    if ((bits >> 49 & 7) != 0 || start % 1024 >= 128) {
      fail(
          where,
          "wgmma of an operand at address %u of shared memory, which is not in the first 128 bytes "
          "of 1024",
          start);
    }
  }

  // Of the chunk that has number `along` of 8 numbers each in the contiguous dimension, and
  // `across` in the other one.
  uint32_t address_along_k(int across, int along) const {
    const auto row = static_cast<uint32_t>(across);
    return start + row / 8 * stride + row % 8 * 128 + static_cast<uint32_t>(along) * 16;
  }
  uint32_t address_along_mn(int across, int along) const {
    const auto row = static_cast<uint32_t>(across), chunk = static_cast<uint32_t>(along);
    return start + chunk / 8 * leading + row / 8 * stride + row % 8 * 128 + chunk % 8 * 16;
  }
};

// Where thread `number` of a warpgroup has word `word` of an accumulator.
int row_of(int number, int word) {
  return number / kLanes * 16 + number % kLanes / 4 + word / 2 % 2 * 8;
}
int column_of(int number, int word) {
  return word / 4 * 8 + number % 4 * 2 + word % 2;
}

}  // namespace

// ---- Registers ----------------------------------------------------------------------------------

bool RegistersOfGroup::overlap(const RegistersOfGroup& other) const {
  const auto* mine = static_cast<const uint32_t*>(of[0]);
  const auto* others = static_cast<const uint32_t*>(other.of[0]);
  return mine < others + other.words && others < mine + words;
}

void RegistersOfGroup::copy_to(std::vector<uint32_t>& values) const {
  const auto size = static_cast<size_t>(words);
  values.resize(kGroupThreads * size);
  for (size_t i = 0; i < kGroupThreads; ++i) memcpy(&values[i * size], of[i], size * 4);
}

bool RegistersOfGroup::equal(const std::vector<uint32_t>& values) const {
  const auto size = static_cast<size_t>(words);
  for (size_t i = 0; i < kGroupThreads; ++i) {
    if (memcmp(&values[i * size], of[i], size * 4) != 0) return false;
  }
  return true;
}

void Products::fence() {
  is_fenced_ = true;
  for (Watched& watched : watched_) {
    watched.registers.copy_to(watched.values);
    watched.has_been_fenced = true;
  }
}

void Products::require_fence(const char* name, const RegistersOfGroup& registers,
                             const Where& where) {
  if (!is_fenced_) fail(where, "wgmma without a wgmma_fence since registers were last free");
  const auto known = std::find_if(watched_.begin(), watched_.end(), [&](const Watched& watched) {
    return watched.registers.are(registers);
  });
  if (known == watched_.end()) {
    if (watched_.size() == kMostWatched) watched_.erase(watched_.begin());
    watched_.push_back({registers, {}, false});
  } else if (known->has_been_fenced && !registers.equal(known->values)) {
    fail(where, "wgmma of %s that was written since wgmma_fence", name);
  }
}

// ---- Operands -----------------------------------------------------------------------------------

const uint16_t* Products::chunk_at(uint32_t address, Product& product) {
  const void* const chunk = shared.pointer_to(swizzled_128(address & 0x3ffff));
  shared.begin_async_read(chunk, actor_, common_, product.where);
  product.chunks.push_back(chunk);
  return static_cast<const uint16_t*>(chunk);
}

void Products::read_a(const WgmmaKind& kind, void* const* operands, Product& product) {
  product.a.words = 0;
  if (given(operands, 0).a != nullptr) {
    product.a.words = 4;
    for (int i = 0; i < kGroupThreads; ++i) {
      product.a.of[i] = const_cast<uint32_t*>(given(operands, i).a);
      for (int w = 0; w < 4; ++w) {
        double* const pair = &a_matrix[row_of(i, w % 2 * 2)][i % 4 * 2 + w / 2 * 8];
        pair[0] = kind.number(static_cast<uint16_t>(given(operands, i).a[w]));
        pair[1] = kind.number(static_cast<uint16_t>(given(operands, i).a[w] >> 16));
      }
    }
    require_fence("an A", product.a, product.where);
    return product.a.copy_to(product.a_values);
  }
  const Descriptor a(given(operands, 0).a_descriptor, product.where);
  for (int across = 0; across < (kind.a_along_m ? kDepth : kRows); ++across) {
    for (int along = 0; along < (kind.a_along_m ? kRows : kDepth) / 8; ++along) {
      const uint32_t address =
          kind.a_along_m ? a.address_along_mn(across, along) : a.address_along_k(across, along);
      const uint16_t* const numbers = chunk_at(address, product);
      for (int e = 0; e < 8; ++e) {
        const int position = 8 * along + e;
        (kind.a_along_m ? a_matrix[position][across] : a_matrix[across][position]) =
            kind.number(numbers[e]);
      }
    }
  }
}

void Products::read_b(const WgmmaKind& kind, uint64_t descriptor, Product& product) {
  const Descriptor b(descriptor, product.where);
  for (int across = 0; across < (kind.b_along_n ? kDepth : kind.columns); ++across) {
    for (int along = 0; along < (kind.b_along_n ? kind.columns : kDepth) / 8; ++along) {
      const uint32_t address =
          kind.b_along_n ? b.address_along_mn(across, along) : b.address_along_k(across, along);
      const uint16_t* const numbers = chunk_at(address, product);
      for (int e = 0; e < 8; ++e) {
        const int k = kind.b_along_n ? across : 8 * along + e;
        const int n = kind.b_along_n ? 8 * along + e : across;
        b_matrix[k][n / 2][n % 2] = kind.number(numbers[e]);
      }
    }
  }
}

// ---- Products -----------------------------------------------------------------------------------

// The one in flight in these registers, or a new one with what they hold.
Products::Accumulator& Products::accumulator(const WgmmaKind& kind, void* const* operands,
                                             const Where& where) {
  RegistersOfGroup registers;
  registers.words = kind.columns / 2;
  for (int i = 0; i < kGroupThreads; ++i) registers.of[i] = given(operands, i).d;
  for (Accumulator& other : accumulators_) {
    if (other.registers.are(registers)) return other;
    if (!other.registers.overlap(registers)) continue;
    fail(where, "wgmma into part of what another product is in flight into (%s:%u)",
         other.where.file_name(), other.where.line());
  }
  if (given(operands, 0).accumulate) {
    require_fence("an accumulator", registers, where);
  } else if (!is_fenced_) {
    fail(where, "wgmma without a wgmma_fence since registers were last free");
  }
  accumulators_.push_back({registers, {}, 0, where});
  registers.copy_to(accumulators_.back().values);
  return accumulators_.back();
}

// d += a b: products are exact, each sum is made in double, from d on by rising k, and rounded
// once.
void multiply(const WgmmaKind& kind, bool accumulate, std::vector<uint32_t>& values) {
  static Pair sums[kRows][kMaxColumns / 2];
  const int words = kind.columns / 2;
  memset(sums, 0, sizeof(sums));
  const auto place = [&](int thread, int word) -> auto {
    return &sums[row_of(thread, word)][column_of(thread, word) / 2];
  };
  const auto value = [&](int thread, int word) -> uint32_t& {
    return values[static_cast<size_t>(thread * words + word)];
  };
  for (int thread = 0; accumulate && thread < kGroupThreads; ++thread) {
    for (int word = 0; word < words; ++word) {
      float sum;
      memcpy(&sum, &value(thread, word), 4);
      (*place(thread, word))[word % 2] = static_cast<double>(sum);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int n = 0; n < kind.columns / 2; ++n) {
      Pair sum = sums[row][n];
      for (int k = 0; k < kDepth; ++k) sum += a_matrix[row][k] * b_matrix[k][n];
      sums[row][n] = sum;
    }
  }
  for (int thread = 0; thread < kGroupThreads; ++thread) {
    for (int word = 0; word < words; ++word) {
      const auto sum = static_cast<float>((*place(thread, word))[word % 2]);
      memcpy(&value(thread, word), &sum, 4);
    }
  }
}

void Products::issue(const WgmmaKind& kind, void* const* operands, const Where& where) {
  const WgmmaOperands& first = given(operands, 0);
  for (int i = 1; i < kGroupThreads; ++i) {
    const WgmmaOperands& other = given(operands, i);
    if (other.a_descriptor == first.a_descriptor && other.b_descriptor == first.b_descriptor &&
        other.accumulate == first.accumulate) {
      continue;
    }
    fail(where, "divergence: wgmma with other operands in thread %d of the warpgroup than in 0", i);
  }
  if (block.has_group_learnt()) block.find_common(common_);
  products_.push_back({{}, {}, {}, committed_, where});
  Product& product = products_.back();
  read_a(kind, operands, product);
  read_b(kind, first.b_descriptor, product);
  Accumulator& sums = accumulator(kind, operands, where);
  multiply(kind, first.accumulate, sums.values);
  sums.group = committed_;
  for (int i = 0; i < kGroupThreads; ++i) {
    std::fill_n(static_cast<uint32_t*>(sums.registers.of[i]), sums.registers.words, kNaN);
  }
}

void Products::land(Accumulator& accumulator, const Where& where) {
  const auto words = static_cast<size_t>(accumulator.registers.words);
  for (size_t i = 0; i < kGroupThreads; ++i) {
    auto* const d = static_cast<uint32_t*>(accumulator.registers.of[i]);
    if (std::any_of(d, d + words, [](uint32_t word) { return word != kNaN; })) {
      fail(where, "the accumulator of a wgmma (%s:%u) was written before this wait",
           accumulator.where.file_name(), accumulator.where.line());
    }
    memcpy(d, &accumulator.values[i * words], words * 4);
  }
}

void Products::wait(int pending, const Where& where) {
  const int done = committed_ - pending;
  for (const Product& product : products_) {
    if (product.group >= done) continue;
    if (product.a.words > 0 && !product.a.equal(product.a_values)) {
      fail(where, "the A in registers of a wgmma (%s:%u) was written before this wait",
           product.where.file_name(), product.where.line());
    }
    for (const void* chunk : product.chunks) shared.end_async_read(chunk, actor_);
  }
  for (Accumulator& accumulator : accumulators_) {
    if (accumulator.group < done) land(accumulator, where);
  }
  std::erase_if(products_, [&](const Product& product) { return product.group < done; });
  std::erase_if(accumulators_, [&](const Accumulator& sums) { return sums.group < done; });
  is_fenced_ = false;
  static Knowledge read;
  read.forget();
  read.learn(actor_, block.advance());
  const int first = block.current().number / kGroupThreads * kGroupThreads;
  for (int i = 0; i < kGroupThreads; ++i) block.learn(block.thread(first + i), read);
}

void Products::end_thread() const {
  if (products_.empty()) return;
  fail(products_.front().where,
       "the thread ends with %zu products not waited for, this one the first", products_.size());
}

void Products::begin_block(int group) {
  actor_ = static_cast<Actor>(kFirstGroup + group);
  is_fenced_ = false;
  committed_ = 0;
  accumulators_.clear();
  products_.clear();
  watched_.clear();
}

Products& products_of(const Thread& thread) {
  return products[thread.number / kGroupThreads];
}

void begin_products() {
  for (int group = 0; group < kMaxGroups; ++group) products[group].begin_block(group);
}

}  // namespace fastattn::emulator
