// Scratch memory and work distribution of the drivers.
#pragma once

#include <fastattn/api.h>

#include <atomic>
#include <cstdlib>
#include <memory>

namespace fastattn::cpu {

// One buffer per calling thread, kept between calls: fresh pages cost more than a short kernel.
// Buffers above the limit go back to the system when the call ends.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    Buffer& kept = kept_buffer();
    if (kept.in_use || bytes > kKeptBytes) {
      own_ = allocate(bytes);
      data_ = own_.get();
      return;
    }
    if (kept.bytes < bytes) {
      kept.memory.reset();
      kept.memory = allocate(bytes);
      kept.bytes = kept.memory ? bytes : 0;
    }
    kept.in_use = true;
    borrowed_ = true;
    data_ = kept.memory.get();
  }
  ~Workspace() {
    if (borrowed_) kept_buffer().in_use = false;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // nullptr when there is no memory.
  char* data() const {
    return data_;
  }

 private:
  static constexpr size_t kKeptBytes = size_t{64} << 20;
  struct Free {
    void operator()(char* p) const {
      std::free(p);
    }
  };
  using Memory = std::unique_ptr<char, Free>;
  struct Buffer {
    Memory memory;
    size_t bytes = 0;
    bool in_use = false;
  };

  static Buffer& kept_buffer() {
    thread_local Buffer buffer;
    return buffer;
  }
  static Memory allocate(size_t bytes) {
    return Memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64)));
  }

  Memory own_;
  char* data_ = nullptr;
  bool borrowed_ = false;
};

// Calls body(item, worker) for every item in [0, count), with `worker` below `workers`. Workers
// take the next items when they are done with some: put long items first. They take several that
// follow one another (as these often lie in memory), and fewer towards the end. Which worker runs
// an item must not change its result.
template <typename Body>
void for_each_item(const Threads& threads, int64_t workers, int64_t count, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count, runs;
    const Body* body;
  } shared;
  constexpr int64_t kRunsPerWorker = 8;
  shared.count = count;
  shared.runs = kRunsPerWorker * workers;
  shared.body = &body;
  const auto work = [](int64_t worker, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    for (int64_t first = s.next; first < s.count;) {
      const int64_t last = first + (s.count - first + s.runs - 1) / s.runs;
      if (!s.next.compare_exchange_weak(first, last)) continue;
      for (int64_t item = first; item < last; ++item) (*s.body)(item, worker);
      first = s.next;
    }
  };
  workers = workers < count ? workers : count;
  if (workers <= 1) {
    work(0, &shared);
  } else {
    threads.run(workers, work, &shared);
  }
}

}  // namespace fastattn::cpu
