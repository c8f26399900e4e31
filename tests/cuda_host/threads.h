// The threads of a block as threads of the host: the sanitizers see what each of them does.
#pragma once

#include <pthread.h>

#include <functional>
#include <thread>
#include <vector>

namespace cuda_host {

// Sleeps at once: far more threads wait for each other than there are processors to spin on.
class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, static_cast<unsigned>(threads)); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// Threads that are kept from launch to launch.
class Crew {
 public:
  explicit Crew(int size) : turn_(size + 1) {
    for (int t = 0; t < size; ++t) {
      threads_.emplace_back([this, t] {
        for (;;) {
          turn_.wait();
          if (body_ == nullptr) return;
          (*body_)(t);
          turn_.wait();
        }
      });
    }
  }

  ~Crew() {
    body_ = nullptr;
    turn_.wait();
    for (std::thread& thread : threads_) thread.join();
  }

  // Calls body(0), body(1), ... on all threads at once.
  void run(const std::function<void(int)>& body) {
    body_ = &body;
    turn_.wait();
    turn_.wait();
  }

 private:
  Barrier turn_;
  const std::function<void(int)>* body_ = nullptr;
  std::vector<std::thread> threads_;
};

}  // namespace cuda_host
