#include "chela/core/status.hpp"

#include <doctest/doctest.h>

#include <string>

using namespace chela;

static_assert(Status{}.ok());
static_assert(require(true, Code::bad_shape, "unseen").ok());
static_assert(!require(false, Code::bad_shape, "seen").ok());

TEST_CASE("a status is ok unless it says what is wrong") {
  const Status fine;
  CHECK(fine.ok());
  CHECK(std::string(fine.why).empty());
  const Status refused = require(false, Code::bad_stride, "x must have unit last stride");
  CHECK(refused.code == Code::bad_stride);
  CHECK(std::string(refused.why) == "x must have unit last stride");
}

TEST_CASE("of several failures the first is told") {
  CHECK(first_failure().ok());
  CHECK(first_failure(Status{}, Status{}).ok());
  const Status status = first_failure(Status{}, Status{Code::bad_value, "first"}, Status{Code::unsupported, "second"});
  CHECK(status.code == Code::bad_value);
  CHECK(std::string(status.why) == "first");
}
