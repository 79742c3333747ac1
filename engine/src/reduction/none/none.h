// The stage of a request without token reduction: every row stays. Owned by its sequence; engine
// thread only.
#pragma once

#include "src/reduction/stage.h"

namespace fq::reduction {

class NoReduction final : public Stage {
 public:
  NoReduction() { report_.stage = "none"; }
  int importance_queries(int) const override { return 0; }
  void decide(const StageInput&, RowPlan* plan, ThreadPool&) override {
    plan->unchanged = true;
    plan->keep.clear();
    plan->root.clear();
  }
  bool finished() const override { return true; }
  const ReductionReport& report() const override { return report_; }

 private:
  ReductionReport report_;
};

}  // namespace fq::reduction
