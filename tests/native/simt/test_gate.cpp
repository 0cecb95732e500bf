// gate_topk and its backward under the harness, against the contract of moe_overlap/ops/gate.py in plain loops.
#include <algorithm>
#include <numeric>

#include "cases.h"
#include "kernels/gate.cu"

namespace {

using cases::Buffer;
using cases::Random;
using namespace moe_overlap;

struct Case {
  int64_t tokens;
  int experts, k, n_group, topk_group;
  Score score;
  bool biased, renormalize;
  float scale;
  int64_t skew;  // bytes by which the logits are off a multiple of 16
};

Case random_case(Random& random) {
  const std::vector<int> sizes{1, 2, 3, 4, 6, 8, 12, 30, 32, 33, 60, 64, 65, 96, 127, 128, 160, 256};
  Case c{};
  c.tokens = random.chance(0.03) ? 0 : random.range(1, 20);
  c.experts = random.chance(0.03) ? static_cast<int>(random.range(257, 1024)) : random.pick(sizes);
  std::vector<int> groups;
  for (int n = 1; n <= c.experts; ++n) {
    if (c.experts % n == 0) groups.push_back(n);
  }
  c.n_group = random.chance(0.3) ? random.pick(groups) : 1;
  c.topk_group = static_cast<int>(random.range(1, c.n_group));
  c.k = static_cast<int>(random.range(1, std::min(kMostGateK, c.experts / c.n_group * c.topk_group)));
  c.score = static_cast<Score>(random.range(0, 2));
  c.biased = random.chance(0.4);
  c.renormalize = random.chance(0.5);
  c.scale = random.chance(0.5) ? 1.0f : 2.5f;
  c.skew = random.chance(0.8) ? 0 : 4;
  return c;
}

enum class Kind { kNormal, kFewValues, kAllEqual, kMostlyMinusInf, kSpiky, kSorted, kCount };

void fill_logits(Buffer<float>& logits, int experts, Random& random) {
  const auto kind = static_cast<Kind>(random.range(0, static_cast<int>(Kind::kCount) - 1));
  for (size_t i = 0; i < logits.size(); ++i) {
    float x = 2.0f * random.normal();
    if (kind == Kind::kFewValues) x = std::round(x);
    if (kind == Kind::kAllEqual) x = random.chance(0.5) ? 0.0f : -0.0f;
    if (kind == Kind::kMostlyMinusInf && random.chance(0.7)) x = -kInfinity;
    if (kind == Kind::kSpiky && random.chance(0.1)) x += random.chance(0.5) ? 200.0f : -200.0f;
    if (kind == Kind::kSorted) x = static_cast<float>(static_cast<int>(i) % experts) / 64.0f;
    logits.data()[i] = x;
  }
}

// Rows that have to be refused. The marks are NaN of both signs, infinity, and nothing but -inf.
void spoil_rows(Buffer<float>& logits, const Case& c, Random& random) {
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (!random.chance(0.1)) continue;
    float* const row = logits.data() + t * c.experts;
    const float all_ones = bits_float(0xffffffffu);
    const float mark = random.pick(std::vector<float>{NAN, all_ones, kInfinity, -kInfinity});
    row[random.range(0, c.experts - 1)] = mark;
    if (mark == -kInfinity) std::fill(row, row + c.experts, mark);
  }
}

// What the experts of a row are chosen by: the logits, or with a bias the scores plus the bias; and the exact scores.
std::vector<float> choices_of(const Case& c, const float* row, const float* bias, std::vector<double>& scores) {
  const auto experts = static_cast<size_t>(c.experts);
  const double most = double{*std::max_element(row, row + experts)};
  std::vector<float> choice(row, row + experts);
  double sum = 0.0;
  for (size_t e = 0; e < experts; ++e) sum += std::exp(double{row[e]} - most);
  scores.assign(row, row + experts);
  for (size_t e = 0; e < experts; ++e) {
    const double x = scores[e];
    if (c.score == Score::kSoftmax) scores[e] = std::exp(x - most) / sum;
    if (c.score == Score::kSigmoid) scores[e] = 1.0 / (1.0 + std::exp(-x));
    if (bias != nullptr) choice[e] = static_cast<float>(scores[e]) + bias[e];
  }
  return choice;
}

std::vector<int> choose(const Case& c, const std::vector<float>& choice) {
  const int size = c.experts / c.n_group;
  std::vector<float> worth(static_cast<size_t>(c.n_group));
  for (int g = 0; g < c.n_group; ++g) {
    std::vector<float> group(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(group.begin(), group.end(), std::greater<float>());
    worth[static_cast<size_t>(g)] = c.biased && size > 1 ? group[0] + group[1] : group[0];
  }
  const auto best_first = [](const std::vector<float>& value) {
    std::vector<int> order(value.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return value[static_cast<size_t>(a)] > value[static_cast<size_t>(b)]; });
    return order;
  };
  std::vector<int> groups = best_first(worth);
  groups.resize(static_cast<size_t>(c.topk_group));
  std::vector<int> chosen;
  for (const int e : best_first(choice)) {
    if (std::find(groups.begin(), groups.end(), e / size) != groups.end()) chosen.push_back(e);
  }
  chosen.resize(static_cast<size_t>(c.k));
  return chosen;
}

// Weights of the chosen in double, and the gradient of the logits for dweights.
std::vector<double> weights_of(const Case& c, const std::vector<double>& scores, const std::vector<int>& chosen) {
  std::vector<double> w;
  for (const int e : chosen) w.push_back(scores[static_cast<size_t>(e)]);
  if (c.score == Score::kTopkSoftmax) {
    const double most = *std::max_element(w.begin(), w.end());
    for (double& x : w) x = std::exp(x - most);
  }
  const double total = std::accumulate(w.begin(), w.end(), 0.0);
  for (double& x : w) {
    if (c.score == Score::kTopkSoftmax) x /= total;
    if (c.score != Score::kTopkSoftmax && c.renormalize) x /= total + 1e-20;
    x *= double{c.scale};
  }
  return w;
}

bool usable(const float* row, int experts) {
  float most = -kInfinity;
  for (int e = 0; e < experts; ++e) {
    if (std::isnan(row[e])) return false;
    most = std::max(most, row[e]);
  }
  return std::isfinite(most);
}

struct Outputs {
  explicit Outputs(const Case& c) : weights(c.tokens * c.k), ids(c.tokens * c.k), counts(c.experts), status(1) {}
  bool same_bytes(const Outputs& other) const {
    return weights.same_bytes(other.weights) && ids.same_bytes(other.ids) && counts.same_bytes(other.counts) &&
           status.same_bytes(other.status);
  }
  Buffer<float> weights;
  Buffer<int32_t> ids, counts, status;
};

GateArgs args_of(const Case& c, const Buffer<float>& logits, const Buffer<float>& bias,
                 Buffer<GateWorkspace>& workspace, Outputs& out) {
  return {logits.data(),
          c.biased ? bias.data() : nullptr,
          c.tokens,
          c.experts,
          c.k,
          c.n_group,
          c.topk_group,
          c.score,
          c.renormalize,
          c.scale,
          0x9e3779b97f4a7c15u,
          workspace.data(),
          out.weights.data(),
          out.ids.data(),
          out.counts.data(),
          out.status.data()};
}

// Blocks of one warp, as many as asked for: with few of them each has to take several rounds, as large inputs do to
// every block, with many some have no row. Of the forward's one never has.
template <typename Args, typename Kernel>
void run_on(int64_t blocks, const Args& args, const Kernel& kernel) {
  with_layout(args.experts,
              [&](auto layout) { launch(kernel(layout), LaunchConfig{blocks, kWarp, 0}, nullptr, args, false); });
}

void run_forward_on(int64_t blocks, const GateArgs& args) {
  run_on(blocks, args, [](auto layout) { return gate_kernel<decltype(layout), 16>; });
}

TEST(gate_chooses_like_a_stable_sort) {
  cases::for_seeds("gate_topk", 1500, [](Random& random) {
    const Case c = random_case(random);
    Buffer<float> logits(c.tokens * c.experts, c.skew), bias(c.experts, c.skew);
    fill_logits(logits, c.experts, random);
    if (random.chance(0.3)) spoil_rows(logits, c, random);
    // With a bias the scores are rounded: they must be equal or well apart.
    for (int e = 0; e < c.experts; ++e)
      bias[e] = random.chance(0.5) ? 0.0f : 4.0f * static_cast<float>(random.range(-3, 3));
    for (size_t i = 0; c.biased && i < logits.size(); ++i)
      logits.data()[i] = std::round(logits.data()[i] * 64.0f) / 64.0f;
    Outputs out(c);
    Buffer<GateWorkspace> workspace(1);
    gate_topk(args_of(c, logits, bias, workspace, out), nullptr);
    std::vector<int> counts(static_cast<size_t>(c.experts), 0);
    bool refused = false;
    for (int64_t t = 0; t < c.tokens; ++t) {
      const float* const row = logits.data() + t * c.experts;
      const int32_t* const ids = out.ids.data() + t * c.k;
      const float* const weights = out.weights.data() + t * c.k;
      if (!usable(row, c.experts)) {
        refused = true;
        for (int k = 0; k < c.k; ++k) CHECK(ids[k] == -1 && weights[k] == 0.0f);
        continue;
      }
      std::vector<double> scores;
      const std::vector<int> chosen = choose(c, choices_of(c, row, c.biased ? bias.data() : nullptr, scores));
      const std::vector<double> want = weights_of(c, scores, chosen);
      for (int k = 0; k < c.k; ++k) {
        const auto place = static_cast<size_t>(k);
        CHECK(ids[k] == chosen[place]);
        CHECK(std::fabs(double{weights[k]} - want[place]) <= 2e-6 * double{c.scale} ||
              (std::isnan(want[place]) && std::isnan(weights[k])));
        if (ids[k] >= 0 && ids[k] < c.experts) ++counts[static_cast<size_t>(ids[k])];
      }
    }
    CHECK(out.status[0] == (refused ? 1 : 0));
    for (int e = 0; e < c.experts; ++e) CHECK(out.counts[e] == counts[static_cast<size_t>(e)]);
    simt::set_seed(12345);  // another interleaving and another grid, the same bits
    Outputs again(c);
    run_forward_on(2, args_of(c, logits, bias, workspace, again));
    CHECK(again.same_bytes(out));
  });
}

// A graph runs again with the same nonce on the same memory, into outputs that hold anything; blocks start in any
// order, one to four at a time. A block that does not wait, or that finds the flags of the run before, loses counts;
// one that waits for a block that cannot start makes no progress.
TEST(gate_blocks_agree_on_zero_counts_in_every_run) {
  simt::set_turn_limit(1'000'000);
  cases::for_seeds("gate_topk on several blocks", 600, [](Random& random) {
    Case c = random_case(random);
    c.tokens = random.chance(0.1) ? 0 : random.range(1, 30);
    Buffer<float> logits(c.tokens * c.experts), bias(c.experts);
    for (int e = 0; e < c.experts; ++e) bias[e] = 0.5f;
    fill_logits(logits, c.experts, random);
    if (random.chance(0.5)) spoil_rows(logits, c, random);
    Buffer<GateWorkspace> workspace(1);
    Outputs want(c);
    run_forward_on(2, args_of(c, logits, bias, workspace, want));
    if (random.chance(0.5)) std::memset(workspace.data(), 0xff, sizeof(GateWorkspace));
    const int64_t blocks = random.range(c.tokens > 0 ? 2 : 1, 9);
    for (int run = 0; run < 3; ++run) {
      simt::set_seed(random.bits()());
      Outputs out(c);
      run_forward_on(blocks, args_of(c, logits, bias, workspace, out));
      CHECK(out.same_bytes(want));
      CHECK(workspace[0].claim == 0 && workspace[0].ready == 0);
    }
  });
  simt::set_turn_limit(200'000'000);
}

// The gradient of sum(dweights * weights) in double, by the rules of the softmax and of the quotient.
std::vector<double> gradient_of(const Case& c, const float* row, const int32_t* ids, const float* dweights) {
  const auto experts = static_cast<size_t>(c.experts);
  std::vector<double> gradient(experts, 0.0), scores;
  choices_of(c, row, nullptr, scores);
  const std::vector<int> chosen(ids, ids + c.k);
  std::vector<double> d(dweights, dweights + c.k), u;
  for (double& x : d) x *= double{c.scale};
  for (const int e : chosen) u.push_back(scores[static_cast<size_t>(e)]);
  if (c.score == Score::kTopkSoftmax) {
    Case plain = c;
    plain.scale = 1.0f;
    u = weights_of(plain, scores, chosen);
    const double dot = std::inner_product(d.begin(), d.end(), u.begin(), 0.0);
    for (size_t k = 0; k < d.size(); ++k) gradient[static_cast<size_t>(chosen[k])] = u[k] * (d[k] - dot);
    return gradient;
  }
  if (c.renormalize) {
    const double total = std::accumulate(u.begin(), u.end(), 1e-20);
    const double dot = std::inner_product(d.begin(), d.end(), u.begin(), 0.0) / total;
    for (double& x : d) x = (x - dot) / total;
  }
  const double dot = std::inner_product(d.begin(), d.end(), u.begin(), 0.0);
  for (size_t k = 0; k < d.size(); ++k) {
    gradient[static_cast<size_t>(chosen[k])] = c.score == Score::kSigmoid ? d[k] * u[k] * (1.0 - u[k]) : d[k];
  }
  for (size_t e = 0; c.score == Score::kSoftmax && e < experts; ++e) gradient[e] = scores[e] * (gradient[e] - dot);
  return gradient;
}

TEST(gate_backward_is_the_gradient) {
  cases::for_seeds("gate_topk_backward", 800, [](Random& random) {
    Case c = random_case(random);
    c.biased = false;
    Buffer<float> logits(c.tokens * c.experts, c.skew), dweights(c.tokens * c.k), bias(0);
    for (size_t i = 0; i < logits.size(); ++i) logits.data()[i] = random.normal();
    for (size_t i = 0; i < dweights.size(); ++i) dweights.data()[i] = random.normal();
    if (random.chance(0.3)) spoil_rows(logits, c, random);
    Outputs forward(c);
    Buffer<GateWorkspace> workspace(1);
    gate_topk(args_of(c, logits, bias, workspace, forward), nullptr);
    Buffer<float> dlogits(c.tokens * c.experts, c.skew), again(c.tokens * c.experts, c.skew);
    GateBackwardArgs args{dweights.data(), logits.data(), forward.ids.data(), c.tokens, c.experts, c.k, c.score,
                          c.renormalize,   c.scale,       dlogits.data()};
    gate_topk_backward(args, nullptr);
    args.dlogits = again.data();
    if (c.tokens > 0) run_on(1, args, [](auto layout) { return gate_backward_kernel<decltype(layout)>; });
    CHECK(again.same_bytes(dlogits));
    for (int64_t t = 0; t < c.tokens; ++t) {
      const float* const row = logits.data() + t * c.experts;
      std::vector<double> want(static_cast<size_t>(c.experts), 0.0);
      if (usable(row, c.experts)) {
        want = gradient_of(c, row, forward.ids.data() + t * c.k, dweights.data() + t * c.k);
      }
      for (int e = 0; e < c.experts; ++e) {
        const double error = std::fabs(double{dlogits[t * c.experts + e]} - want[static_cast<size_t>(e)]);
        CHECK(error <= 2e-5 * double{c.scale});
      }
    }
  });
}

TEST(gate_config_fills_the_chip_and_no_more) {
  GateArgs args{};
  args.experts = 128;
  const auto text = [&](int64_t tokens) {
    args.tokens = tokens;
    return gate_config(args).text();
  };
  CHECK(text(0) == "grid 1 block 32 shared 0 B");  // the forward's first block has no rows
  CHECK(text(1) == "grid 2 block 32 shared 0 B");
  CHECK(text(16384) == "grid 257 block 512 shared 0 B");
  CHECK(text(int64_t{1} << 24) == "grid 1057 block 512 shared 0 B");
  args.experts = 1024;
  CHECK(text(9) == "grid 3 block 256 shared 0 B");
  GateBackwardArgs backward{};
  backward.experts = 128;
  CHECK(gate_config(backward).grid == 0);
  backward.tokens = 16384;
  CHECK(gate_config(backward).text() == "grid 256 block 512 shared 0 B");
}

TEST(gate_refuses_what_it_does_not_take) {
  GateArgs args{};
  args.experts = 1025;
  args.k = 1;
  CHECK_THROWS((gate_topk(args, nullptr), 0), std::invalid_argument, "1025 experts and k = 1, the kernel takes 1024");
  args.experts = 64;
  args.k = 17;
  CHECK_THROWS((gate_topk(args, nullptr), 0), std::invalid_argument, "64 experts and k = 17");
  args.k = 8;
  CHECK_THROWS((gate_topk(args, nullptr), 0), std::invalid_argument, "nonce = 0");
}

}  // namespace
