#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

// Work in pieces that are taken by whichever thread is free, so that a call does not wait for a thread that the
// operating system keeps from running: on a shared machine a wait is a time slice of some other program. What threads
// compute must not depend on who takes which piece.

namespace miniquant::algorithms {

/// Multiply-adds below which a second thread costs more than it saves.
inline constexpr int64_t kSerialOperations = 500'000;

/// Threads for `pieces` pieces of work with `operations` multiply-adds in all: at least 1, at most
/// at::get_num_threads(), and 1 inside another parallel region.
int64_t team_size(int64_t pieces, int64_t operations);

/// The numbers 0 to count - 1, each handed out once, in order.
class Pieces {
 public:
  explicit Pieces(int64_t count) : count_(count) {}

  /// Whether there is one more, which `piece` is then set to.
  [[nodiscard]] bool take(int64_t& piece) {
    piece = next_.fetch_add(1, std::memory_order_relaxed);
    return piece < count_;
  }

 private:
  std::atomic<int64_t> next_ = 0;
  int64_t count_;
};

/// A few threads that run one function together, the calling thread among them.
class Team {
 public:
  explicit Team(int64_t size) : size_(size) {}

  /// Runs `member` on every thread of the team, in one parallel region, and waits for all. Others need not have begun
  /// when the first to begin ends. An exception of a member stops the team and is thrown here.
  void run(const std::function<void()>& member);

  /// body(piece) for pieces that no other member took, until none is left or the team is stopped. Called by a member.
  template <typename Body>
  void take(Pieces& pieces, const Body& body) const {
    for (int64_t piece = 0; !stopped() && pieces.take(piece);) {
      body(piece);
    }
  }

  /// Ends wait_until() and take() in every member.
  void stop() { stopped_.store(true, std::memory_order_relaxed); }
  [[nodiscard]] bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

  /// Waits until `condition()` is true, and lets others run meanwhile. Returns false where the team was stopped. Called
  /// by a member, for what another member has begun.
  template <typename Condition>
  [[nodiscard]] bool wait_until(const Condition& condition) const {
    for (int64_t turn = 0; !condition(); ++turn) {
      if (stopped()) {
        return false;
      }
      pause(turn);
    }
    return true;
  }

 private:
  /// A moment's pause: of the processor at first, then of the thread.
  static void pause(int64_t turn) {
    constexpr int64_t kTurnsOfProcessor = 4096;
    if (turn < kTurnsOfProcessor) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  int64_t size_;
  std::atomic<bool> stopped_ = false;
};

/// body(piece) for 0 <= piece < count, in parallel where `operations` multiply-adds in all are worth it.
template <typename Body>
void for_pieces(int64_t count, int64_t operations, const Body& body) {
  Team team(team_size(count, operations));
  Pieces pieces(count);
  team.run([&] { team.take(pieces, body); });
}

}  // namespace miniquant::algorithms
