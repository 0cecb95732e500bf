#include "core/search.h"

#include "check.h"

using moe_overlap::Cut;

TEST(search_refuses_lists_of_different_lengths) {
  CHECK_THROWS(search(Cut{0, 0, 0, 1, 1, {}, {}, {}, {}, {}}), std::invalid_argument, "one entry per chunk");
  CHECK_THROWS(search(Cut{0, 0, 0, 1, 1, {}, {1, 2}, {1}, {1, 2}, {}}), std::invalid_argument, "got 2, 1 and 2");
  CHECK_THROWS(search(Cut{0, 0, 0, 1, 1, {}, {1}, {-1}, {1}, {}}), std::invalid_argument, "seconds >= 0");
}
