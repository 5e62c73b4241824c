#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

// Work is cut into pieces, and any thread that is free takes the next one. So a call does not wait for a thread that
// the operating system keeps from running; on a shared machine such a wait lasts a time slice of another program. What
// threads compute must not depend on which thread takes which piece.

namespace miniquant::algorithms {

/// Multiply-adds below which a second thread costs more than it saves.
inline constexpr int64_t kSerialOperations = 500'000;

/// The cost of a pass over memory for each entry, in multiply-adds: high, because it waits for memory.
inline constexpr int64_t kOperationsPerEntryRead = 8;

/// Number of threads for `pieces` pieces of work with `operations` multiply-adds in all: at least 1, at most
/// at::get_num_threads(), and 1 inside another parallel region.
int64_t team_size(int64_t pieces, int64_t operations);

/// The numbers 0 to count - 1, each handed out once, in order.
class Pieces {
 public:
  explicit Pieces(int64_t count) : count_(count) {}

  /// Sets `piece` to the next number. Returns false if there is none left.
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

  /// Runs `member` on every thread of the team, in one parallel region, and waits for all of them. One member may end
  /// before another begins. An exception in a member stops the team and is thrown here.
  void run(const std::function<void()>& member);

  /// body(piece) for pieces that no other member took, until none is left or the team is stopped. Called by a member.
  template <typename Body>
  void take(Pieces& pieces, const Body& body) const {
    for (int64_t piece = 0; !stopped() && pieces.take(piece);) {
      body(piece);
    }
  }

  /// Makes every member leave wait_until() and take no more pieces.
  void stop() { stopped_.store(true, std::memory_order_relaxed); }
  [[nodiscard]] bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

  /// Waits until `condition()` is true; other threads may run meanwhile. Returns false if the team was stopped. A
  /// member calls it to wait for work that another member has begun.
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
  /// Pauses for a moment: the first turns pause the processor, later ones yield the thread.
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
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  int64_t size_;
  std::atomic<bool> stopped_ = false;
};

/// body(piece) for 0 <= piece < count; in parallel where `operations`, multiply-adds in all, are enough.
template <typename Body>
void for_pieces(int64_t count, int64_t operations, const Body& body) {
  Team team(team_size(count, operations));
  Pieces pieces(count);
  team.run([&] { team.take(pieces, body); });
}

/// first(piece) for 0 <= piece < firsts, and then second(piece) for 0 <= piece < seconds, each of which begins after
/// all of the first; in parallel as for_pieces(). Each thread calls a copy of `second` of its own, which may hold a
/// workspace.
template <typename First, typename Second>
void for_pieces_in_turn(int64_t firsts, const First& first, int64_t seconds, const Second& second, int64_t operations) {
  Team team(team_size(std::max(firsts, seconds), operations));
  Pieces pieces(firsts + seconds);
  std::atomic<int64_t> done = 0;
  team.run([&] {
    Second own = second;
    team.take(pieces, [&](int64_t piece) {
      if (piece < firsts) {
        first(piece);
        done.fetch_add(1, std::memory_order_release);
      } else if (team.wait_until([&] { return done.load(std::memory_order_acquire) == firsts; })) {
        own(piece - firsts);
      }
    });
  });
}

}  // namespace miniquant::algorithms
