// Short windows in which all threads do the same at the same time. A window's rate is what all of
// them did, over the time from the first start to the last end. The best window counts: whatever
// else runs on the machine can only slow one down.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kNoThreads = -2;  // instead of a rate: the system refused a thread
constexpr double kWindow = 3e-3;   // seconds; short, so that on a busy machine some are undisturbed

class Gate {
 public:
  explicit Gate(int64_t threads) : threads_(threads) {}

  // None goes on before all have come. It yields: there may be more threads than cores.
  void wait() {
    const int64_t round = arrived_.fetch_add(1) / threads_;
    while (arrived_.load() < (round + 1) * threads_) std::this_thread::yield();
  }

 private:
  const int64_t threads_;
  std::atomic<int64_t> arrived_{0};
};

template <class Body>
class Windows {
 public:
  Windows(int threads, double seconds, const Body& body)
      : body_(body), gate_(threads), starts_(threads), ends_(threads), seconds_(seconds) {}

  // Repeats of the body per second, summed over the threads, or kNoThreads.
  double best() {
    // A gate would wait for ever for a thread that the system refused, so none passes before all
    // are there.
    std::atomic<int> go{0};
    std::vector<std::thread> others;
    try {
      for (size_t t = 1; t < starts_.size(); ++t) {
        others.emplace_back([this, t, &go] {
          while (go.load() == 0) std::this_thread::yield();
          if (go.load() > 0) run(t);
        });
      }
      go = 1;
    } catch (const std::system_error&) {
      go = -1;
    }
    begun_ = Clock::now();
    if (go.load() > 0) run(0);
    for (std::thread& other : others) other.join();
    return go.load() > 0 ? best_ : kNoThreads;
  }

 private:
  void run(size_t thread) {
    body_(thread, 1);  // caches, pages and the clock warm up
    for (;;) {
      gate_.wait();
      if (repeats_ == 0) return;
      starts_[thread] = Clock::now();
      body_(thread, repeats_);
      ends_[thread] = Clock::now();
      gate_.wait();
      if (thread == 0) judge();
    }
  }

  // Only thread 0 is between these two gates; the next one shows the others what it wrote.
  void judge() {
    const auto first = *std::min_element(starts_.begin(), starts_.end());
    const auto last = *std::max_element(ends_.begin(), ends_.end());
    const double took = seconds_between(first, last);
    if (took < kWindow / 2) {  // too short for the clock and the threads' skew: only a step
      const double factor = took > 0 ? std::clamp(kWindow / took, 2.0, 64.0) : 64.0;
      repeats_ = static_cast<int64_t>(static_cast<double>(repeats_) * factor);
      return;
    }
    const double done = static_cast<double>(repeats_) * static_cast<double>(starts_.size());
    best_ = std::max(best_, done / took);
    if (seconds_between(begun_, Clock::now()) >= seconds_) repeats_ = 0;
  }

  static double seconds_between(Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double>(to - from).count();
  }

  const Body& body_;
  Gate gate_;
  std::vector<Clock::time_point> starts_, ends_;
  const double seconds_;
  Clock::time_point begun_;
  int64_t repeats_ = 1;
  double best_ = 0;
};

// The best rate of body(thread, repeats) on `threads` threads in windows over about `seconds`.
template <class Body>
double best_rate(int threads, double seconds, const Body& body) {
  return Windows<Body>(threads, seconds, body).best();
}

}  // namespace
