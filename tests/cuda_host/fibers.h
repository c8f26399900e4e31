// The threads of a block as contexts that one thread of the host runs in turn: many times faster than threads, and a
// barrier that is missing shows in the results, because each runs alone up to its next barrier.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace cuda_host {

class Crew {
 public:
  explicit Crew(int size) : contexts_(size), stacks_(size, std::vector<char>(kStack)) { current() = this; }

  // Calls body(0), body(1), ... each in a context of its own.
  void run(const std::function<void(int)>& body) {
    body_ = &body;
    unfinished_ = size();
    finished_.assign(contexts_.size(), false);
    for (int t = 0; t < size(); ++t) {
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks_[t].data();
      contexts_[t].uc_stack.ss_size = kStack;
      contexts_[t].uc_link = &caller_;
      makecontext(&contexts_[t], &Crew::enter, 0);
    }
    running_ = 0;
    swapcontext(&caller_, &contexts_[0]);
  }

  // Lets the next unfinished one run.
  void yield() {
    const int self = running_;
    do {
      running_ = (running_ + 1) % size();
    } while (finished_[running_]);
    if (running_ == self) return;
    swapcontext(&contexts_[self], &contexts_[running_]);
    threadIdx.x = static_cast<unsigned>(self);
  }

  static Crew*& current() {
    static Crew* crew = nullptr;
    return crew;
  }

 private:
  static constexpr size_t kStack = 1 << 16;

  static void enter() {
    Crew& crew = *current();
    (*crew.body_)(crew.running_);
    crew.finished_[crew.running_] = true;
    if (--crew.unfinished_ > 0) crew.yield();
  }

  int size() const { return static_cast<int>(contexts_.size()); }

  std::vector<ucontext_t> contexts_;
  std::vector<std::vector<char>> stacks_;
  std::vector<bool> finished_;
  ucontext_t caller_;
  const std::function<void(int)>* body_ = nullptr;
  int unfinished_ = 0;
  int running_ = 0;
};

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const int64_t phase = phase_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++phase_;
    }
    while (phase_ == phase) Crew::current()->yield();
  }

 private:
  int threads_;
  int arrived_ = 0;
  int64_t phase_ = 0;
};

}  // namespace cuda_host
