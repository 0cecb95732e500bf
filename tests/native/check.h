// The smallest test harness that reports file, line and expression. TEST(name) { CHECK(...); CHECK_THROWS(...); }
#pragma once

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

struct TestCase {
  const char* name;
  void (*run)();
};

inline std::vector<TestCase>& test_cases() {
  static std::vector<TestCase> cases;
  return cases;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Registration {
  Registration(const char* name, void (*run)()) { test_cases().push_back({name, run}); }
};

#define TEST(name)                                               \
  static void test_##name();                                     \
  static const Registration register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++failures();                                                             \
    }                                                                           \
  } while (0)

#define CHECK_THROWS(expression, type, text)                                                                 \
  do {                                                                                                       \
    bool thrown = false;                                                                                     \
    try {                                                                                                    \
      (void)(expression);                                                                                    \
    } catch (const type& error) {                                                                            \
      thrown = std::strstr(error.what(), text) != nullptr;                                                   \
      if (!thrown) std::printf("%s:%d: the message is: %s\n", __FILE__, __LINE__, error.what());             \
    }                                                                                                        \
    if (!thrown) {                                                                                           \
      std::printf("%s:%d: %s did not throw %s with \"%s\"\n", __FILE__, __LINE__, #expression, #type, text); \
      ++failures();                                                                                          \
    }                                                                                                        \
  } while (0)
