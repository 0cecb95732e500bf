#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fiber.h"
#include "kernels/device.cuh"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr int kMostResident = 4;
constexpr size_t kSharedAlignment = 16;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Block;

struct Fiber {
  Context context;
  Block* block = nullptr;
  int thread = 0;
  State state = State::kReady;
  Site site{};           // where it waits
  uint32_t members = 0;  // of the warp operation it waits in
  uint64_t value = 0;    // what it brought, then what it takes away
  int source = 0;
};

struct Free {
  void operator()(unsigned char* memory) const { ::operator delete(memory, std::align_val_t{kSharedAlignment}); }
};
using Memory = std::unique_ptr<unsigned char, Free>;

struct Block {
  int64_t index = 0;
  std::vector<Fiber> fibers;
  std::vector<void*> stacks;
  int at_barrier = 0;  // fibers that wait there
  int done = 0;
  const Fiber* first_at_barrier = nullptr;
  const Fiber* first_done = nullptr;
  Memory dynamic;
  std::unordered_map<const void*, Memory> arrays;
};

uint64_t chosen_seed = 0;
int64_t turn_limit = 200'000'000;
std::vector<void*> free_stacks;

std::string name(const Fiber& fiber) {
  std::string text = "block " + std::to_string(fiber.block->index) + " thread " + std::to_string(fiber.thread);
  if (fiber.state == State::kDone) return text + " has left the kernel";
  if (fiber.state == State::kReady) return text + " runs";
  const char* slash = std::strrchr(fiber.site.file, '/');
  return text + " is in " + kOpNames[static_cast<int>(fiber.site.op)] + " at " + (slash ? slash + 1 : fiber.site.file) +
         ":" + std::to_string(fiber.site.line);
}

bool same(const Site& a, const Site& b) { return a.op == b.op && a.line == b.line && std::strcmp(a.file, b.file) == 0; }

[[noreturn]] void fail(const std::string& what, const Fiber& one, const Fiber& other) {
  throw Error(what + ": " + name(one) + ", " + name(other));
}

// One launch: the resident blocks, the fibers that can run, and whose turn it is.
class Launch {
 public:
  Launch(int64_t grid, int block, int shared_bytes, const std::function<void()>& kernel)
      : kernel_(kernel),
        random_(chosen_seed),
        in_order_(chosen_seed == 0),
        threads_(block),
        shared_bytes_(shared_bytes) {
    for (int64_t index = grid - 1; index >= 0; --index) waiting_.push_back(index);
    if (!in_order_) std::shuffle(waiting_.begin(), waiting_.end(), random_);
    resident_ = in_order_ ? 1 : 1 + random_() % kMostResident;
    poison_ = chosen_seed % 2 == 0 ? 0xff : 0x7f;  // NaN and -1, or huge
  }

  void run() {
    for (int64_t turns = 0;; ++turns) {
      while (blocks_.size() < resident_ && !waiting_.empty()) start_block();
      if (blocks_.empty()) return;
      if (ready_.empty()) report_deadlock();
      if (turns > turn_limit) throw Error("no progress after " + std::to_string(turns) + " turns: " + name(*ready_[0]));
      turn(next_ready());
    }
  }

  void enter() {
    Fiber* const self = running_;
    arrived(self->context, host_);
    try {
      kernel_();
    } catch (...) {
      error_ = std::current_exception();
    }
    self->state = State::kDone;
    switch_to(self->context, host_, true);
    std::abort();
  }

  // The running fiber stops here, in the state it has set.
  void pause() { switch_to(running_->context, host_); }

  Fiber& running() { return *running_; }
  bool flip() { return !in_order_ && random_() % 4 == 0; }
  unsigned char poison() const { return poison_; }

  ~Launch() {
    for (auto& block : blocks_) recycle(*block);
  }

 private:
  void start_block();
  void turn(Fiber* fiber);
  Fiber* next_ready();
  void at_barrier(Fiber& fiber);
  void in_warp(Fiber& fiber);
  void left(Fiber& fiber);
  [[noreturn]] void report_deadlock();
  void recycle(Block& block) { free_stacks.insert(free_stacks.end(), block.stacks.begin(), block.stacks.end()); }

  const std::function<void()>& kernel_;
  std::mt19937_64 random_;
  const bool in_order_;
  const int threads_;
  const int shared_bytes_;
  size_t resident_ = 1;
  unsigned char poison_ = 0xff;
  std::vector<int64_t> waiting_;  // blocks that have not started, the next one last
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Fiber*> ready_;
  size_t oldest_ = 0;
  Fiber* running_ = nullptr;
  Context host_;
  std::exception_ptr error_;
};

Launch* current = nullptr;

// Exactly so many bytes, so that AddressSanitizer knows the end.
Memory poisoned(int64_t bytes, unsigned char with) {
  Memory memory(
      static_cast<unsigned char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{kSharedAlignment})));
  std::memset(memory.get(), with, static_cast<size_t>(bytes));
  return memory;
}

void Launch::start_block() {
  auto block = std::make_unique<Block>();
  block->index = waiting_.back();
  waiting_.pop_back();
  block->dynamic = poisoned(shared_bytes_, poison_);
  block->fibers.resize(static_cast<size_t>(threads_));
  for (int thread = 0; thread < threads_; ++thread) {
    if (free_stacks.empty()) free_stacks.push_back(new_stack());
    block->stacks.push_back(free_stacks.back());
    free_stacks.pop_back();
    Fiber& fiber = block->fibers[static_cast<size_t>(thread)];
    fiber.block = block.get();
    fiber.thread = thread;
    prepare(fiber.context, block->stacks.back(), [] { current->enter(); });
    ready_.push_back(&fiber);
  }
  blocks_.push_back(std::move(block));
}

Fiber* Launch::next_ready() {
  if (in_order_) {  // first in, first out
    Fiber* const fiber = ready_[oldest_++];
    if (oldest_ == ready_.size()) {
      ready_.clear();
      oldest_ = 0;
    } else if (oldest_ > 4096) {
      ready_.erase(ready_.begin(), ready_.begin() + static_cast<std::ptrdiff_t>(oldest_));
      oldest_ = 0;
    }
    return fiber;
  }
  std::swap(ready_[random_() % ready_.size()], ready_.back());
  Fiber* const fiber = ready_.back();
  ready_.pop_back();
  return fiber;
}

void Launch::turn(Fiber* fiber) {
  running_ = fiber;
  threadIdx = {static_cast<unsigned>(fiber->thread), 0, 0};
  blockIdx = {static_cast<unsigned>(fiber->block->index), 0, 0};
  fiber->state = State::kReady;
  switch_to(host_, fiber->context);
  if (error_) std::rethrow_exception(error_);
  switch (fiber->state) {
    case State::kReady:
      ready_.push_back(fiber);
      break;
    case State::kAtBarrier:
      at_barrier(*fiber);
      break;
    case State::kInWarp:
      in_warp(*fiber);
      break;
    case State::kDone:
      left(*fiber);
      break;
  }
}

void Launch::at_barrier(Fiber& fiber) {
  Block& block = *fiber.block;
  if (block.first_done) fail("a thread has left the kernel before a barrier", fiber, *block.first_done);
  if (block.at_barrier++ == 0) block.first_at_barrier = &fiber;
  if (!same(block.first_at_barrier->site, fiber.site)) fail("divergent barrier", fiber, *block.first_at_barrier);
  if (block.at_barrier < threads_) return;
  block.at_barrier = 0;
  for (Fiber& other : block.fibers) {
    other.state = State::kReady;
    ready_.push_back(&other);
  }
}

uint64_t result(const Site& site, const Fiber* warp, const Fiber& self) {
  uint64_t answer = 0;
  if (site.op == Op::kShuffle) {
    if (((self.members >> self.source) & 1) == 0) {
      throw Error("a shuffle reads lane " + std::to_string(self.source) + ", which takes no part: " + name(self));
    }
    return warp[self.source].value;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (((self.members >> lane) & 1) == 0) continue;
    const uint64_t value = warp[lane].value;
    if (site.op == Op::kBallot) answer |= (value & 1) << lane;
    if (site.op == Op::kMatch) answer |= static_cast<uint64_t>(value == self.value) << lane;
    if (site.op == Op::kMax) answer = std::max(answer, value);
  }
  return answer;
}

void Launch::in_warp(Fiber& fiber) {
  Fiber* const warp = &fiber.block->fibers[static_cast<size_t>(fiber.thread / kWarp * kWarp)];
  if (((fiber.members >> (fiber.thread % kWarp)) & 1) == 0)
    throw Error("a lane is not among its members: " + name(fiber));
  bool complete = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (((fiber.members >> lane) & 1) == 0) continue;
    const Fiber& other = warp[lane];
    if (other.state == State::kDone) fail("a warp operation waits for a thread that has left", fiber, other);
    if (other.state != State::kInWarp || other.members != fiber.members) {
      complete = false;
    } else if (!same(other.site, fiber.site)) {
      fail("divergent warp operation", fiber, other);
    }
  }
  if (!complete) return;
  uint64_t answers[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((fiber.members >> lane) & 1) answers[lane] = result(fiber.site, warp, warp[lane]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (((fiber.members >> lane) & 1) == 0) continue;
    warp[lane].value = answers[lane];
    warp[lane].state = State::kReady;
    ready_.push_back(&warp[lane]);
  }
}

void Launch::left(Fiber& fiber) {
  Block& block = *fiber.block;
  if (block.done++ == 0) block.first_done = &fiber;
  if (block.at_barrier > 0) fail("a thread has left the kernel before a barrier", fiber, *block.first_at_barrier);
  const Fiber* const warp = &block.fibers[static_cast<size_t>(fiber.thread / kWarp * kWarp)];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (warp[lane].state == State::kInWarp && ((warp[lane].members >> (fiber.thread % kWarp)) & 1) != 0) {
      fail("a warp operation waits for a thread that has left", warp[lane], fiber);
    }
  }
  if (block.done < threads_) return;
  recycle(block);
  blocks_.erase(std::find_if(blocks_.begin(), blocks_.end(), [&](const auto& other) { return other.get() == &block; }));
}

void Launch::report_deadlock() {
  std::string text = "deadlock";
  int listed = 0;
  for (const auto& block : blocks_) {
    for (const Fiber& fiber : block->fibers) {
      if (fiber.state != State::kDone && listed++ < 8) text += (listed == 1 ? ": " : ", ") + name(fiber);
    }
  }
  throw Error(text + (listed > 8 ? ", and " + std::to_string(listed - 8) + " more" : ""));
}

}  // namespace

void set_seed(uint64_t seed) { chosen_seed = seed; }
void set_turn_limit(int64_t turns) { turn_limit = turns; }

void launch(int64_t grid, int block, int shared_bytes, const std::function<void()>& kernel) {
  blockDim = {static_cast<unsigned>(block), 1, 1};
  gridDim = {static_cast<unsigned>(grid), 1, 1};
  Launch launched(grid, block, shared_bytes, kernel);
  current = &launched;
  struct Reset {
    ~Reset() { current = nullptr; }
  } reset;
  launched.run();
}

void meet_block(const Site& site) {
  Fiber& self = current->running();
  self.state = State::kAtBarrier;
  self.site = site;
  current->pause();
}

uint64_t meet_warp(const Site& site, uint32_t members, uint64_t value, int source) {
  Fiber& self = current->running();
  self.state = State::kInWarp;
  self.site = site;
  self.members = members;
  self.value = value;
  self.source = source;
  current->pause();
  return self.value;
}

void yield() { current->pause(); }

void maybe_yield() {
  if (current->flip()) current->pause();
}

namespace {
std::function<void()> launch_before;
}
void set_launch_before(const std::function<void()>& writes) { launch_before = writes; }
void finish_launch_before() {
  maybe_yield();
  if (launch_before != nullptr) std::exchange(launch_before, nullptr)();
}

int lane() { return current->running().thread % kWarp; }

void* shared_array(const void* key, int64_t bytes) {
  auto& arrays = current->running().block->arrays;
  const auto found = arrays.find(key);
  if (found != arrays.end()) return found->second.get();
  return arrays.emplace(key, poisoned(bytes, current->poison())).first->second.get();
}

unsigned char* dynamic_shared() { return current->running().block->dynamic.get(); }

}  // namespace simt

// ---- 16-bit floats, to nearest, ties to even ----

namespace moe_overlap {

float to_float(bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

float to_float(fp16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31, fraction = value.bits & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0)
    return std::copysign(std::ldexp(static_cast<float>(fraction), -24), bits_float(sign | 0x3f800000u));
  return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}

template <>
bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_bits(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

template <>
fp16 from_float<fp16>(float value) {
  const auto sign = static_cast<uint16_t>((float_bits(value) >> 16) & 0x8000u);
  if (std::isnan(value)) return {0x7fff};
  const float size = std::fabs(value);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // The last place that is kept is worth 2^-24 below 2^-14, above it 2^-10 of the power of two.
  int exponent = 0;
  std::frexp(size, &exponent);
  const int place = std::max(exponent - 11, -24);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -place)));
  if (units == 0) return {sign};
  return {static_cast<uint16_t>(sign + units + (static_cast<uint32_t>(place + 24) << 10))};
}

}  // namespace moe_overlap
