#include "driver/progress.h"

#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <ostream>

namespace miniquant::driver {
namespace {

constexpr std::size_t kBarWidth = 24;
// Returns to the start of the line and erases it.
constexpr std::string_view kWipe = "\r\x1b[K";

}  // namespace

Progress::Progress(std::ostream& stream, bool enabled, std::size_t steps)
    : stream_(stream), enabled_(enabled), steps_(steps) {}

Progress::~Progress() { finish(); }

void Progress::step(std::string_view description) {
  if (!enabled_) return;
  const std::size_t done = step_ < steps_ ? step_ : steps_;
  const std::size_t filled = steps_ == 0 ? kBarWidth : kBarWidth * done / steps_;
  stream_ << kWipe << '[' << std::string(filled, '#') << std::string(kBarWidth - filled, '.') << "] " << done << '/'
          << steps_ << "  " << description << std::flush;
  ++step_;
  drawn_ = true;
}

void Progress::finish() {
  if (!drawn_) return;
  stream_ << kWipe << std::flush;
  drawn_ = false;
}

bool error_stream_is_terminal() {
  const char* terminal = std::getenv("TERM");
  return ::isatty(STDERR_FILENO) == 1 && terminal != nullptr && std::string_view(terminal) != "dumb";
}

void Stages::run(std::string name, const std::function<void()>& work) {
  announce_(name);
  const double start = now();
  work();
  seconds_.emplace_back(std::move(name), now() - start);
}

double Stages::now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace miniquant::driver
