#include "check.h"

int main() {
  for (const TestCase& test : test_cases()) {
    const int before = failures();
    test.run();
    std::printf("%s %s\n", failures() == before ? "ok    " : "FAILED", test.name);
  }
  return failures() == 0 && !test_cases().empty() ? 0 : 1;
}
