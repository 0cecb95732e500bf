// Fibers: a stack of their own, switched to by hand. swapcontext would do, but it makes a system call at every switch,
// and a launch has many thousands of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

constexpr size_t kStackBytes = 64 << 10;

// The place where a fiber (or the host thread) stopped.
struct Context {
  void* stack_pointer = nullptr;
  // For AddressSanitizer, which has to know on which stack it is.
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
};

// A stack with an inaccessible page below it. Kept for the process's life and reused.
void* new_stack();
// Makes `fiber` begin with entry() on `stack`, which entry must never return from.
void prepare(Context& fiber, void* stack, void (*entry)());
// Stores where we are in `from` and goes on at `to`. `last`: `from` never runs again.
void switch_to(Context& from, Context& to, bool last = false);
// What the entry function of a fiber calls first.
void arrived(Context& self, Context& from);

}  // namespace simt
