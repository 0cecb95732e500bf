// What the tests of kernels share: seeded random numbers, guarded buffers and the loop over cases.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "simt.h"

namespace cases {

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  // A whole number in [low, high].
  int64_t range(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits_() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(double probability) { return uniform() < probability; }
  float uniform() { return static_cast<float>(bits_() >> 40) / static_cast<float>(1 << 24); }
  float normal() { return std::normal_distribution<float>()(bits_); }
  template <typename T>
  const T& pick(const std::vector<T>& values) {
    return values[static_cast<size_t>(range(0, static_cast<int64_t>(values.size()) - 1))];
  }
  std::mt19937_64& bits() { return bits_; }

 private:
  std::mt19937_64 bits_;
};

// Memory that begins `skew` bytes after a multiple of 256 and ends where it ends: AddressSanitizer sees one byte more.
// Every byte is poisoned (NaN in all float types, -1 in integers).
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t skew = 0) : count_(static_cast<size_t>(count)) {
    const auto bytes = static_cast<size_t>(skew) + count_ * sizeof(T);
    memory_ = static_cast<unsigned char*>(::operator new(bytes, std::align_val_t{256}));
    data_ = reinterpret_cast<T*>(memory_ + skew);
    std::memset(memory_, 0xff, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(memory_, std::align_val_t{256}); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  bool same_bytes(const Buffer& other) const {
    return count_ == other.count_ && std::memcmp(data_, other.data_, count_ * sizeof(T)) == 0;
  }

 private:
  size_t count_;
  unsigned char* memory_ = nullptr;
  T* data_ = nullptr;
};

// Runs one(random) for the seeds 0 to count - 1; the harness interleaves by the same seed. The first case that fails is
// named, and the rest are left out.
template <typename One>
void for_seeds(const char* what, int count, const One& one) {
  for (int seed = 0; seed < count; ++seed) {
    const int before = failures();
    simt::set_seed(static_cast<uint64_t>(seed));
    Random random(static_cast<uint64_t>(seed));
    try {
      one(random);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", what, error.what());
      ++failures();
    }
    if (failures() != before) {
      std::printf("%s: the case of seed %d failed\n", what, seed);
      return;
    }
  }
}

}  // namespace cases
