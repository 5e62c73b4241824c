#pragma once

#include <cstddef>
#include <functional>
#include <iosfwd>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace miniquant::driver {

/// One line with the current step, rewritten in place; nothing is written unless `enabled`.
class Progress {
 public:
  Progress(std::ostream& stream, bool enabled, std::size_t steps);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();

  /// Shows that the next of `steps` begins.
  void step(std::string_view description);

  /// Wipes the line.
  void finish();

 private:
  std::ostream& stream_;
  bool enabled_;
  std::size_t steps_;
  std::size_t step_ = 0;
  bool drawn_ = false;
};

/// Whether standard error is a terminal that can rewrite a line.
[[nodiscard]] bool error_stream_is_terminal();

/// Runs the stages of a run one after the other, announces each and measures its time.
class Stages {
 public:
  explicit Stages(std::function<void(std::string_view)> announce) : announce_(std::move(announce)) {}

  /// Calls `work`.
  void run(std::string name, const std::function<void()>& work);

  /// Stage and seconds, in the order they were run.
  [[nodiscard]] const std::vector<std::pair<std::string, double>>& seconds() const { return seconds_; }

 private:
  static double now();

  std::function<void(std::string_view)> announce_;
  std::vector<std::pair<std::string, double>> seconds_;
};

}  // namespace miniquant::driver
