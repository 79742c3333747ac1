// The method as its definition reads, in double and with the slowest obvious algorithms: what the
// stage is compared with on random scenes.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/engine/reduction/helpers.h"

namespace fq::reduction::test {

class Naive {
 public:
  Naive(const FrameFusionOptions& options, const Scene& scene, int layers)
      : o_(options),
        depth_(options.budget_layers > 0 ? options.budget_layers : layers),
        slots_(scene.slots) {
    for (int i = 0; i < static_cast<int>(slots_.size()); ++i) {
      if (slots_[i] < 0) continue;
      if (first_ < 0) first_ = i;
      length_ = i - first_ + 1;
    }
    original_ = static_cast<int>(slots_.size());
  }

  struct Step {
    std::string branch = "noop";
    std::vector<int> kept;
    std::vector<double> x;  // of the kept rows
    double margin = 1.0;    // how far the closest decision was from going the other way
  };

  Step call(const Scene& scene, const std::vector<float>& importance) {
    Step step;
    std::vector<double> x(scene.x.begin(), scene.x.end());
    const int rows = static_cast<int>(slots_.size());
    const auto w = static_cast<int>(scene.width);
    std::vector<bool> goes(rows, false);
    double bound = 0.0;
    if (!merge_done_ || !prune_done_) {
      if (!budget(&bound)) {
        step.branch = "budget_missed";
        merge_done_ = prune_done_ = true;
      } else if (!merge_done_) {
        merge(x, w, bound, &goes, &step);
      } else {
        prune(importance, bound, &goes, &step);
      }
    }
    std::vector<int> slots;
    for (int i = 0; i < rows; ++i) {
      if (goes[i]) continue;
      step.kept.push_back(i);
      slots.push_back(slots_[i]);
      step.x.insert(step.x.end(), x.begin() + i * w, x.begin() + (i + 1) * w);
    }
    slots_.assign(slots.begin(), slots.end());
    return step;
  }
  bool done() const { return prune_done_; }

 private:
  bool budget(double* bound) const {
    const int n = static_cast<int>(r_.size());
    if (n >= depth_) return false;
    double spent = 0, s = 1;
    for (int i = 0; i < n; ++i) {
      s = 1;
      for (int j = 0; j <= i; ++j) s *= 1 - r_[j];
      spent += s;
    }
    const double rem = depth_ * o_.cost - spent;
    if (rem < 0) return false;
    const double v = rem / ((depth_ - n) * s);
    *bound = v > 1 ? 0 : 1 - v;
    return true;
  }

  void merge(std::vector<double>& x, int w, double bound, std::vector<bool>* goes, Step* step) {
    const int rows = static_cast<int>(slots_.size());
    std::vector<int> prev(rows, -1);
    std::vector<std::pair<double, int>> ranked;  // -similarity, row: sorted ascending, ties by row
    double visual = 0;
    for (int i = 0; i < rows; ++i) {
      if (slots_[i] < 0) continue;
      ++visual;
      for (int j = i - 1; j >= 0 && prev[i] < 0; --j) {
        if (slots_[j] == slots_[i]) prev[i] = j;
      }
      if (prev[i] < 0) continue;
      double dot = 0, aa = 0, bb = 0;
      for (int d = 0; d < w; ++d) {
        const double a = x[i * w + d], b = x[prev[i] * w + d];
        dot += a * b;
        aa += a * a;
        bb += b * b;
      }
      ranked.emplace_back(-dot / std::sqrt(aa * bb), i);
    }
    std::sort(ranked.begin(), ranked.end());
    size_t merging = 0;
    for (const auto& [negative, row] : ranked) {
      merging += -negative >= o_.similarity_lower_bound;
      step->margin = std::min(step->margin, std::abs(-negative - o_.similarity_lower_bound));
    }
    const double share = static_cast<double>(merging) / visual;
    step->margin = std::min({step->margin, std::abs(share - bound) + (bound == 0),
                             std::abs(share - o_.ratio_lower_bound) + (share == 0)});
    if (share < bound) {
      r_.push_back(share);
      merge_done_ = share < o_.ratio_lower_bound;
      step->branch = merge_done_ ? "merge_and_stop" : "merge_continue";
    } else {
      merging = static_cast<size_t>(std::floor(bound * visual));
      step->branch = "budget_topk";
      merge_done_ = prune_done_ = true;
      if (merging > 0 && merging < ranked.size()) {
        step->margin = std::min(step->margin, ranked[merging].first - ranked[merging - 1].first);
      }
    }
    for (size_t i = 0; i < merging; ++i) (*goes)[ranked[i].second] = true;
    const std::vector<double> old = x;
    for (int root = 0; root < rows; ++root) {
      if ((*goes)[root]) continue;
      int members = 1;
      for (int i = root + 1; i < rows; ++i) {
        int at = i;
        while ((*goes)[at]) at = prev[at];
        if (at != root || i == root) continue;
        ++members;
        for (int d = 0; d < w; ++d) x[root * w + d] += old[i * w + d];
      }
      for (int d = 0; d < w; ++d) x[root * w + d] /= members;
    }
  }

  void prune(const std::vector<float>& importance, double bound, std::vector<bool>* goes,
             Step* step) {
    step->branch = "prune";
    merge_done_ = prune_done_ = true;
    const int range = length_ - (original_ - static_cast<int>(slots_.size()));
    std::vector<std::pair<float, int>> ranked;
    for (int i = first_; i < first_ + range; ++i) {
      if (o_.prune_text || slots_[i] >= 0) ranked.emplace_back(-importance[i], i);
    }
    std::sort(ranked.begin(), ranked.end());
    const double exact = static_cast<double>(ranked.size()) * (1 - bound);
    auto keep = static_cast<size_t>(std::nearbyint(exact));
    if (ranked.size() == slots_.size()) keep = std::max<size_t>(keep, 1);
    for (size_t i = keep; i < ranked.size(); ++i) (*goes)[ranked[i].second] = true;
  }

  FrameFusionOptions o_;
  int depth_;
  std::vector<int> slots_;
  int first_ = -1, length_ = 0, original_ = 0;
  std::vector<double> r_;
  bool merge_done_ = false, prune_done_ = false;
};

}  // namespace fq::reduction::test
