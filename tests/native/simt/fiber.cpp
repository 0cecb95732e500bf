#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// simt_switch(save, load): pushes the registers that a call preserves, stores the stack pointer at *save, takes the one
// in `load` and pops them there.
#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
constexpr size_t kSavedWords = 7;  // six registers, then the address to return to
constexpr size_t kReturnWord = 6;
constexpr size_t kWordsAbove = 1;  // on entry the stack is 8 bytes off a multiple of 16, as after a call
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
constexpr size_t kSavedWords = 20;
constexpr size_t kReturnWord = 11;
constexpr size_t kWordsAbove = 0;
#else
#error "the SIMT harness switches stacks by hand: write simt_switch for this processor"
#endif

extern "C" void simt_switch(void** save, void* load);

namespace simt {

void* new_stack() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    throw std::runtime_error("no memory for the stacks of the SIMT harness");
  }
  return static_cast<char*>(memory) + page;
}

void prepare(Context& fiber, void* stack, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);  // what an abandoned fiber left behind
#endif
  auto* const top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack) + kStackBytes);
  uintptr_t* const saved = top - kWordsAbove - kSavedWords - (kWordsAbove + kSavedWords) % 2;
  for (uintptr_t* word = saved; word != top; ++word) *word = 0;
  saved[kReturnWord] = reinterpret_cast<uintptr_t>(entry);
  fiber = {saved, nullptr, stack, kStackBytes};
}

void switch_to(Context& from, Context& to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#else
  (void)last;
#endif
  simt_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrived(Context& self, Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  // The host thread's stack is not ours: its bounds are learnt here.
  __sanitizer_finish_switch_fiber(self.fake_stack, &from.stack_bottom, &from.stack_bytes);
#else
  (void)self;
  (void)from;
#endif
}

}  // namespace simt
