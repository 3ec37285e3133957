// The orders in which blocks, warps and lanes run.
#pragma once

#include <stdint.h>

#include <numeric>

namespace fastattn::emulator {

// SplitMix64 (Steele, Lea and Flood, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t x = state_;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }

 private:
  uint64_t state_;
};

// 0 to count in another order: from anywhere on, by steps that meet every number.
class Order {
 public:
  explicit Order(uint64_t count = 1) : count_(count) {}

  Order(uint64_t count, Random& random) : count_(count), start_(random.next() % count) {
    do {
      stride_ = random.next() % count + 1;
    } while (std::gcd(stride_, count) != 1);
  }

  uint64_t operator[](uint64_t position) const {
    return static_cast<uint64_t>((start_ + static_cast<unsigned __int128>(position) * stride_) %
                                 count_);
  }

 private:
  uint64_t count_, start_ = 0, stride_ = 1;
};

// The same for the lanes of a warp, which change often.
class LaneOrder {
 public:
  void shuffle(Random& random) {
    const uint64_t bits = random.next();
    start_ = static_cast<uint32_t>(bits);
    stride_ = static_cast<uint32_t>(bits >> 32) | 1;
  }
  uint32_t operator[](uint32_t position) const {
    return (start_ + position * stride_) % 32;
  }

 private:
  uint32_t start_ = 0, stride_ = 1;
};

}  // namespace fastattn::emulator
