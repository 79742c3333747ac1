// A decode step allocates nothing: pages, their ids, workspaces and scratch were made at load or at
// admission. Lives in the program that counts allocations.
#include "src/core/aligned.h"
#include "tests/engine/core/allocation_counter.h"
#include "tests/engine/runtime/engine_fixture.h"

namespace fq::testing {
namespace {

using DecodeAllocation = EngineTest;

TEST_F(DecodeAllocation, CounterSeesEveryKind) {
  const int64_t before = allocation_count();
  AlignedBuffer<float> aligned(16);
  std::vector<int> plain(16);
  EXPECT_EQ(allocation_count() - before, 2);
}

TEST_F(DecodeAllocation, NothingIsAllocatedWhateverTheFormat) {
  for (const char* kv : {"kv16", "kv8", "k8v4+rotate", "kv3g16+ends16", "kv2"}) {
    for (const int threads : {1, 2}) {
      SCOPED_TRACE(::testing::Message() << kv << " threads " << threads);
      EngineOptions options = manual();
      options.kv = kv;
      options.threads = threads;
      auto engine = make(options);
      std::vector<Stream> streams;
      // Two sequences that take new pages while they decode: at 64, and past a chunk at 512.
      for (const int length : {40, 500}) {
        Request request = text_request(length, static_cast<uint32_t>(length), 60);
        request.return_logits = false;
        streams.push_back(engine->submit(request));
      }
      const auto drain = [&] {
        for (Stream& stream : streams) (void)stream.next_for(0);
      };
      for (int step = 0; step < 8; ++step) {  // prefill and the first decode steps
        engine->step();
        drain();
      }
      int64_t allocated = 0;
      for (int step = 0; step < 40; ++step) {
        const int64_t before = allocation_count();
        ASSERT_TRUE(engine->step());
        allocated += allocation_count() - before;
        drain();
      }
      EXPECT_EQ(allocated, 0);
      engine->run();
    }
  }
}

}  // namespace
}  // namespace fq::testing
