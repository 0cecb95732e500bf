#include "gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace moe_overlap {
namespace {

// With more places a new value would move too many of them.
constexpr int64_t kMostInserted = 32;

template <typename Float>
struct Candidate {
  Float value;
  int32_t id;
};

template <typename Float>
inline bool above(Float left, Float right) {
  return left > right || (std::isnan(left) && !std::isnan(right));
}

// The order of the result, without equals.
template <typename Float>
inline bool before(const Candidate<Float>& left, const Candidate<Float>& right) {
  return above(left.value, right.value) || (!above(right.value, left.value) && left.id < right.id);
}

// The `most` best of the candidates that were offered in the order of their ids, best first.
template <typename Float>
class Best {
 public:
  explicit Best(int64_t most) : found_(static_cast<size_t>(most)) {}

  void clear() { count_ = 0; }

  void offer(Float value, int32_t id) {
    if (count_ == found_.size()) {
      if (value <= found_.back().value) return;
      if (!above(value, found_.back().value)) return;
      --count_;
    }
    size_t place = count_++;
    for (; place > 0 && above(value, found_[place - 1].value); --place) found_[place] = found_[place - 1];
    found_[place] = {value, id};
  }

  const Candidate<Float>& operator[](size_t place) const { return found_[place]; }
  size_t size() const { return count_; }

 private:
  std::vector<Candidate<Float>> found_;
  size_t count_ = 0;
};

// Whether the greatest value of a row is a number; eight at a time, as each maximum waits for the one before.
template <typename Float>
bool has_greatest(const Float* row, int64_t count) {
  constexpr int64_t kLanes = 8;
  Float greatest[kLanes];
  std::fill_n(greatest, kLanes, -std::numeric_limits<Float>::infinity());
  int nans[kLanes] = {};
  const auto take = [&](int64_t lane, Float value) {
    greatest[lane] = value > greatest[lane] ? value : greatest[lane];
    nans[lane] |= value != value;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) take(lane, row[i + lane]);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) take(lane, row[i]);
  return std::none_of(nans, nans + kLanes, [](int nan) { return nan != 0; }) &&
         std::isfinite(*std::max_element(greatest, greatest + kLanes));
}

// What one thread keeps from token to token.
template <typename Float>
class Chooser {
 public:
  explicit Chooser(const GateArgs<Float>& args)
      : args_(args),
        size_(args.experts / args.groups),
        groups_(args.kept_groups),
        best_(std::min(args.k, kMostInserted)) {}

  void choose(const Float* choice, int32_t* ids) {
    rank_groups(choice);
    if (args_.k > kMostInserted) return sort(choice, ids);
    best_.clear();
    each_eligible(choice, [&](Float value, int32_t id) { best_.offer(value, id); });
    for (size_t place = 0; place < best_.size(); ++place) ids[place] = best_[place].id;
  }

 private:
  // Leaves in kept_ the groups that stay, in the order of their numbers.
  void rank_groups(const Float* choice) {
    if (args_.kept_groups == args_.groups) return;
    groups_.clear();
    for (int64_t group = 0; group < args_.groups; ++group) {
      groups_.offer(worth_of(choice + group * size_), static_cast<int32_t>(group));
    }
    kept_.clear();
    for (size_t place = 0; place < groups_.size(); ++place) kept_.push_back(groups_[place].id);
    std::sort(kept_.begin(), kept_.end());
  }

  // The sum of the `summed` best values of a group; NaN where it holds one, as this is above every other value.
  Float worth_of(const Float* group) const {
    Float first = -std::numeric_limits<Float>::infinity(), second = first;
    bool nan = false;
    for (int64_t i = 0; i < size_; ++i) {
      nan |= std::isnan(group[i]);
      second = std::max(second, std::min(first, group[i]));
      first = std::max(first, group[i]);
    }
    if (nan) return std::numeric_limits<Float>::quiet_NaN();
    return std::min(args_.summed, size_) == 2 ? first + second : first;
  }

  // act(value, id) for the experts of the groups that stay, in the order of their ids.
  template <typename Act>
  void each_eligible(const Float* choice, const Act& act) {
    if (args_.kept_groups == args_.groups) {
      for (int64_t id = 0; id < args_.experts; ++id) act(choice[id], static_cast<int32_t>(id));
      return;
    }
    for (const int32_t group : kept_) {
      for (int64_t id = group * size_; id < (group + 1) * size_; ++id) {
        // As the reference has it, where -inf is what stands for the experts of other groups.
        const Float lowest = std::numeric_limits<Float>::lowest();
        act(choice[id] < lowest ? lowest : choice[id], static_cast<int32_t>(id));
      }
    }
  }

  void sort(const Float* choice, int32_t* ids) {
    all_.clear();
    each_eligible(choice, [&](Float value, int32_t id) { all_.push_back({value, id}); });
    std::partial_sort(all_.begin(), all_.begin() + args_.k, all_.end(), before<Float>);
    for (int64_t place = 0; place < args_.k; ++place) ids[place] = all_[static_cast<size_t>(place)].id;
  }

  const GateArgs<Float>& args_;
  int64_t size_;
  Best<Float> groups_, best_;
  std::vector<int32_t> kept_;
  std::vector<Candidate<Float>> all_;
};

}  // namespace

template <typename Float>
void choose_experts(const GateArgs<Float>& args, int64_t first, int64_t end) {
  Chooser<Float> chooser(args);
  for (int64_t token = first; token < end; ++token) {
    int32_t* const ids = args.ids + token * args.k;
    if (has_greatest(args.logits + token * args.experts, args.experts)) {
      chooser.choose(args.choice + token * args.experts, ids);
    } else {
      std::fill_n(ids, args.k, -1);
    }
  }
}

template void choose_experts(const GateArgs<float>&, int64_t, int64_t);
template void choose_experts(const GateArgs<double>&, int64_t, int64_t);

bool count_chosen(const int32_t* ids, int64_t slots, int64_t experts, int32_t* counts) {
  std::fill_n(counts, experts, 0);
  bool none = false;
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (ids[slot] < 0) {
      none = true;
    } else {
      ++counts[ids[slot]];
    }
  }
  return none;
}

template <typename Float>
void gate_gradient(const GateGradientArgs<Float>& args, int64_t first, int64_t end) {
  for (int64_t token = first; token < end; ++token) {
    const int32_t* const ids = args.ids + token * args.k;
    const Float* const chosen = args.chosen + token * args.k;
    const Float* const scores = args.scores == nullptr ? nullptr : args.scores + token * args.experts;
    Float* const logits = args.logits + token * args.experts;
    const bool none = ids[0] < 0;
    if (none || scores == nullptr) {
      std::fill_n(logits, args.experts, Float{0});
      for (int64_t place = 0; !none && place < args.k; ++place) logits[ids[place]] = chosen[place];
      continue;
    }
    const Float weighted = args.weighted[token], others = Float{0} - weighted;  // -weighted, but for the sign of zero
    for (int64_t expert = 0; expert < args.experts; ++expert) logits[expert] = scores[expert] * others;
    for (int64_t place = 0; place < args.k; ++place) {
      logits[ids[place]] = scores[ids[place]] * (chosen[place] - weighted);
    }
  }
}

template void gate_gradient(const GateGradientArgs<float>&, int64_t, int64_t);
template void gate_gradient(const GateGradientArgs<double>&, int64_t, int64_t);

}  // namespace moe_overlap
