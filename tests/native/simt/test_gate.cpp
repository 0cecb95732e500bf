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

// Logits as far apart as rounding in another order of sums cannot bridge, or equal.
float grid(float x) { return std::round(x * 64.0f) / 64.0f; }

enum class Kind { kNormal, kFewValues, kAllEqual, kMostlyMinusInf, kSpiky, kSorted, kCount };

void fill_logits(Buffer<float>& logits, int experts, Random& random) {
  const auto kind = static_cast<Kind>(random.range(0, static_cast<int>(Kind::kCount) - 1));
  for (size_t i = 0; i < logits.size(); ++i) {
    float x = grid(2.0f * random.normal());
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

// What the experts of a row are chosen by, computed as the kernel does up to the order of the sum.
std::vector<float> choices_of(const Case& c, const float* row, const float* bias, std::vector<double>& scores) {
  const auto experts = static_cast<size_t>(c.experts);
  const float most = *std::max_element(row, row + experts);
  std::vector<float> choice(experts);
  double sum = 0.0;
  for (size_t e = 0; e < experts; ++e) sum += std::exp(double{row[e]} - double{most});
  scores.resize(experts);
  for (size_t e = 0; e < experts; ++e) {
    const double x = double{row[e]};
    scores[e] = c.score == Score::kSoftmax   ? std::exp(x - double{most}) / sum
                : c.score == Score::kSigmoid ? 1.0 / (1.0 + std::exp(-x))
                                             : x;
    float value = c.score == Score::kSoftmax   ? std::exp(row[e] - most)
                  : c.score == Score::kSigmoid ? 1.0f / (1.0f + std::exp(-row[e]))
                                               : row[e];
    if (bias != nullptr) value = static_cast<float>(c.score == Score::kSoftmax ? double{value} / sum : double{value});
    choice[e] = bias != nullptr ? value + bias[e] : value;
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
  std::vector<float> kept = choice;
  if (c.topk_group < c.n_group) {
    const std::vector<int> groups = best_first(worth);
    for (int rank = c.topk_group; rank < c.n_group; ++rank) {
      std::fill_n(kept.begin() + groups[static_cast<size_t>(rank)] * size, size, -kInfinity);
    }
  }
  std::vector<int> chosen = best_first(kept);
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
  Buffer<float> weights;
  Buffer<int32_t> ids, counts, status;
};

void run(const Case& c, const Buffer<float>& logits, const Buffer<float>& bias, Outputs& out) {
  gate_topk({logits.data(), c.biased ? bias.data() : nullptr, c.tokens, c.experts, c.k, c.n_group, c.topk_group,
             c.score, c.renormalize, c.scale, out.weights.data(), out.ids.data(), out.counts.data(), out.status.data()},
            nullptr);
}

TEST(gate_chooses_like_a_stable_sort) {
  cases::for_seeds("gate_topk", 2000, [](Random& random) {
    const Case c = random_case(random);
    Buffer<float> logits(c.tokens * c.experts, c.skew), bias(c.experts, c.skew);
    fill_logits(logits, c.experts, random);
    if (random.chance(0.3)) spoil_rows(logits, c, random);
    // Steps of the bias that no rounding of the scores can bridge.
    for (int e = 0; e < c.experts; ++e) bias[e] = random.chance(0.5) ? 0.0f : 4.0f * random.normal();
    Outputs out(c);
    run(c, logits, bias, out);
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
    simt::set_seed(12345);  // another interleaving, the same bits
    Outputs again(c);
    run(c, logits, bias, again);
    CHECK(again.weights.same_bytes(out.weights) && again.ids.same_bytes(out.ids));
  });
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
  cases::for_seeds("gate_topk_backward", 1000, [](Random& random) {
    Case c = random_case(random);
    c.biased = false;
    Buffer<float> logits(c.tokens * c.experts, c.skew), dweights(c.tokens * c.k), bias(0);
    for (size_t i = 0; i < logits.size(); ++i) logits.data()[i] = random.normal();
    for (size_t i = 0; i < dweights.size(); ++i) dweights.data()[i] = random.normal();
    if (random.chance(0.3)) spoil_rows(logits, c, random);
    Outputs forward(c);
    run(c, logits, bias, forward);
    Buffer<float> dlogits(c.tokens * c.experts, c.skew);
    gate_topk_backward({dweights.data(), logits.data(), forward.ids.data(), c.tokens, c.experts, c.k, c.score,
                        c.renormalize, c.scale, dlogits.data()},
                       nullptr);
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
  CHECK(text(0) == "grid 0 block 0 shared 0 B");
  CHECK(text(1) == "grid 1 block 32 shared 0 B");
  CHECK(text(16384) == "grid 256 block 512 shared 0 B");
  CHECK(text(int64_t{1} << 24) == "grid 1056 block 512 shared 0 B");
  args.experts = 1024;
  CHECK(text(9) == "grid 2 block 256 shared 0 B");
}

TEST(gate_refuses_what_it_does_not_take) {
  GateArgs args{};
  args.experts = 1025;
  args.k = 1;
  CHECK_THROWS((gate_topk(args, nullptr), 0), std::invalid_argument, "1025 experts and k = 1, the kernel takes 1024");
  args.experts = 64;
  args.k = 17;
  CHECK_THROWS((gate_topk(args, nullptr), 0), std::invalid_argument, "64 experts and k = 17");
}

}  // namespace
