// How the blocks of one launch add to counts and status although nobody has set these to zero before it.
//
// One of the blocks does, and then puts the nonce of this call into `ready`; no other one adds before that. It is the
// block that was the first to put the nonce into `claim` when it had no rows left: block 0, which has none at all, long
// before anyone has something to add; or, should a GPU start that one late, another one. So a block only ever waits for
// one that is already running, in whatever order they start and however few are resident.
//
// The workspace needs no value from before, as no memory holds the nonce by accident (2^-64): it is that of this call
// alone. A graph, however, runs again with the same nonce and the same memory; so the last block to leave puts zeros
// there. Nothing is kept from one call to the next, and calls on other streams have other workspaces.
#pragma once

#include "kernels/device.cuh"

namespace moe_overlap {

enum { kPrepared, kOurs, kTheirs };  // the counts, as a block finds them

__device__ inline bool counts_ready(const GateArgs& args) { return load_acquire(&args.workspace->ready) == args.nonce; }

// By one warp, when its block has no rows left; `ready` is what its first lane knows from before. After the next
// barrier all of the block may add. The result, of the first lane: how many blocks were here before this one.
__device__ inline int wait_for_counts(const GateArgs& args, bool ready) {
  GateWorkspace* const workspace = args.workspace;
  int state = kPrepared;
  if (lane_id() == 0 && !ready && (blockIdx.x == 0 || !counts_ready(args))) {
    state = atomic_exchange(&workspace->claim, args.nonce) != args.nonce ? kOurs : kTheirs;
    fence_device();  // the claim comes before this block is counted in `left`, and so before the zeros of the last one
  }
  if (shfl_idx(state, 0) == kOurs) {
    for (int i = lane_id(); i < args.experts; i += kWarp) args.counts[i] = 0;
    if (lane_id() == 0) {
      *args.status = 0;
      workspace->left = 0;
    }
    sync_warp();
    if (lane_id() == 0) store_release(&workspace->ready, args.nonce);
  }
  while (state == kTheirs && !counts_ready(args)) {
  }
  // This block does not look at the flags again. It has yet to add, but nobody asks for the answer before that.
  return lane_id() == 0 ? atomic_add(&workspace->left, 1) : 0;
}

// By the thread that has the result of the wait: the last block, after which no other one looks at the flags.
__device__ inline void leave_counts(const GateArgs& args, int before) {
  if (before != static_cast<int>(gridDim.x) - 1) return;
  fence_device();
  args.workspace->claim = 0;
  args.workspace->ready = 0;
}

}  // namespace moe_overlap
