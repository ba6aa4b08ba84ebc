// Runs the threads of a CUDA grid as fibers of one host thread, in an order drawn from a seed.
//
// A thread runs until it meets a barrier, a warp's exchange, a fence or an atomic operation; then the
// scheduler picks the next. ThreadSanitizer is told of each fiber and of what orders memory in CUDA's
// model, and of nothing else: it finds two accesses that no barrier or fence orders, however the fibers
// happened to run. So this file itself is compiled without it.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

#ifdef CUDA_HOST_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace cuda_host {

Schedule schedule;
int fault = 0;

namespace {

constexpr unsigned kNoSync = 1;          // a switch of fibers orders nothing
constexpr uint64_t kStack = 256 << 10;   // ThreadSanitizer reports on a fiber's stack
constexpr uint64_t kSharedLimit = 48 << 10;
constexpr unsigned kWarp = 32;

enum class State { ready, at_barrier, at_exchange, wants_memory, done };

struct Block;

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* tsan = nullptr;
  Block* block = nullptr;
  unsigned number = 0;  // in the block
  State state = State::ready;
  unsigned char value[16];  // given to the warp's exchange, and taken from it
  int bytes = 0;
  unsigned lane = 0;
  char before_fence, seen;  // addresses that stand for what its fences release, and may acquire
};

struct Block {
  unsigned number = 0;
  std::vector<Fiber*> fibers;
  unsigned at_barrier = 0, done = 0;
  std::vector<unsigned> at_exchange;  // of each warp
  std::map<int, void*> shared;
  uint64_t shared_bytes = 0;
  int wanted = 0;  // the id, bytes and alignment that a fiber wants
  uint64_t wanted_bytes = 0, wanted_align = 0;
  char barriers[2];  // addresses that stand for the even and the odd barriers
  unsigned barrier = 0;
};

ucontext_t host;
void* host_fiber = nullptr;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
dim3 grid_dim, block_dim;
char launched, ended;  // addresses that stand for the launch and for its end
std::map<const void*, void*> couriers;  // of each atomic variable, a fiber that knows what it releases
std::string trouble;

std::deque<Fiber> pool;  // of every launch so far

void enter() {
  __tsan_acquire(&launched);
  (*body)();
  __tsan_release(&ended);
  current->state = State::done;
  __tsan_switch_to_fiber(host_fiber, kNoSync);
  swapcontext(&current->context, &host);
}

// From a fiber to the scheduler.
void leave(State state) {
  Fiber* self = current;
  self->state = state;
  __tsan_switch_to_fiber(host_fiber, kNoSync);
  swapcontext(&self->context, &host);
}

void start(Fiber& fiber, Block& block, unsigned number) {
  if (!fiber.stack) {
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                       -1, 0);
    if (fiber.stack == MAP_FAILED) std::abort();
    fiber.tsan = __tsan_create_fiber(0);
  }
  fiber.block = &block;
  fiber.number = number;
  fiber.state = State::ready;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

// Gives the block the memory that its current fiber asks for.
void give_memory(Block& block) {
  block.shared_bytes += block.wanted_bytes;
  if (block.shared_bytes > kSharedLimit)
    trouble = "a block has " + std::to_string(block.shared_bytes) + " bytes of shared memory";
  const uint64_t align = std::max<uint64_t>(block.wanted_align, 16);
  void* data = nullptr;
  if (posix_memalign(&data, align, block.wanted_bytes)) std::abort();
  volatile unsigned char* bytes = static_cast<unsigned char*>(data);
  for (uint64_t i = 0; i < block.wanted_bytes; ++i) bytes[i] = 0xcd;
  block.shared[block.wanted] = data;
  __tsan_release(&block.shared);
}

unsigned threads_of_warp(const Block& block, unsigned warp) {
  return std::min<unsigned>(kWarp, unsigned(block.fibers.size()) - warp * kWarp);
}

// The threads of a grid that can run, and the blocks that they are of.
class Grid {
 public:
  Grid(unsigned blocks, unsigned threads) : threads_(threads), random_(schedule.seed) {
    for (unsigned i = 0; i < blocks; ++i) waiting_.push_back(i);
    if (schedule.order == Order::reverse) std::reverse(waiting_.begin(), waiting_.end());
    if (schedule.order == Order::shuffled || schedule.order == Order::interleaved)
      std::shuffle(waiting_.begin(), waiting_.end(), random_);
    const unsigned at_a_time = schedule.order == Order::interleaved ? std::max(schedule.resident, 1) : 1;
    blocks_.resize(std::min(at_a_time, blocks));
    while (pool.size() < blocks_.size() * threads) pool.emplace_back();
    ready_.reserve(blocks_.size() * threads);
    for (Block& block : blocks_) next(block);
  }

  ~Grid() {
    for (void* memory : retired_) std::free(memory);
  }

  void run() {
    while (!ready_.empty()) {
      const size_t pick = random_() % ready_.size();
      std::swap(ready_[pick], ready_.back());
      current = ready_.back();
      ready_.pop_back();
      __tsan_switch_to_fiber(current->tsan, kNoSync);
      swapcontext(&host, &current->context);
      after(*current);
    }
    for (Block& block : blocks_)
      if (block.done < block.fibers.size()) {
        trouble = "block " + std::to_string(block.number) + ": " + std::to_string(block.at_barrier) + " of " +
                  std::to_string(threads_) + " threads wait at a barrier for ever, " +
                  std::to_string(block.done) + " are done";
        release(block);
      }
    __tsan_acquire(&ended);
  }

 private:
  // What the scheduler does when a fiber has come back.
  void after(Fiber& fiber) {
    Block& block = *fiber.block;
    switch (fiber.state) {
      case State::wants_memory: give_memory(block); [[fallthrough]];
      case State::ready: wake(fiber); break;
      case State::at_barrier:
        if (++block.at_barrier == threads_) {
          block.at_barrier = 0;
          ++block.barrier;
          for (Fiber* other : block.fibers) wake(*other);
        }
        break;
      case State::at_exchange: exchange(block, fiber.number / kWarp); break;
      case State::done:
        if (++block.done == threads_) {
          release(block);
          next(block);
        }
    }
  }

  void exchange(Block& block, unsigned warp) {
    const unsigned count = threads_of_warp(block, warp);
    if (++block.at_exchange[warp] < count) return;
    block.at_exchange[warp] = 0;
    Fiber** lanes = block.fibers.data() + warp * kWarp;
    unsigned char values[kWarp][16];
    for (unsigned i = 0; i < count; ++i) std::copy_n(lanes[i]->value, 16, values[i]);
    for (unsigned i = 0; i < count; ++i) {
      std::copy_n(values[std::min(lanes[i]->lane, count - 1)], 16, lanes[i]->value);
      wake(*lanes[i]);
    }
  }

  void wake(Fiber& fiber) {
    fiber.state = State::ready;
    ready_.push_back(&fiber);
  }

  void release(Block& block) {
    for (auto& [id, memory] : block.shared) retired_.push_back(memory);
    block.shared.clear();
    block.shared_bytes = 0;
  }

  // Starts a block in the place of one that is done, if any is left.
  void next(Block& block) {
    block.fibers.clear();
    block.done = 0;
    if (waiting_.empty()) return;
    block.number = waiting_.front();
    waiting_.pop_front();
    block.at_exchange.assign((threads_ + kWarp - 1) / kWarp, 0);
    const size_t first = (&block - blocks_.data()) * threads_;
    for (unsigned i = 0; i < threads_; ++i) {
      start(pool[first + i], block, i);
      block.fibers.push_back(&pool[first + i]);
      wake(pool[first + i]);
    }
  }

  const unsigned threads_;
  std::mt19937_64 random_;
  std::deque<unsigned> waiting_;  // blocks
  std::vector<Block> blocks_;     // those at work
  std::vector<Fiber*> ready_;
  std::vector<void*> retired_;  // shared memory of blocks that are done, freed when nobody runs
};

dim3 unfold(unsigned number, dim3 size) {
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

}  // namespace

const char* problem() { return trouble.c_str(); }

void barrier() {
  Block& block = *current->block;
  char* const address = &block.barriers[block.barrier % 2];
  __tsan_release(address);
  leave(State::at_barrier);
  __tsan_acquire(address);
}

// As in C++: what comes before a fence and an atomic operation after it comes before what follows another
// thread's fence, if an atomic operation before that one saw the first.
void fence() {
  leave(State::ready);
  __tsan_acquire(&current->seen);
  __tsan_release(&current->before_fence);
}

void atomic(const void* address) {
  leave(State::ready);
  if (!current->tsan) return;
  void*& courier = couriers[address];
  if (!courier) courier = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(courier, kNoSync);
  __tsan_release(&current->seen);
  __tsan_acquire(&current->before_fence);
  __tsan_switch_to_fiber(current->tsan, kNoSync);
}

void exchange(void* value, int bytes, unsigned lane) {
  if (bytes > 16) std::abort();
  Fiber* self = current;
  volatile unsigned char* own = static_cast<unsigned char*>(value);  // volatile: no call of memcpy
  for (int i = 0; i < bytes; ++i) self->value[i] = own[i];
  self->lane = lane;
  leave(State::at_exchange);
  for (int i = 0; i < bytes; ++i) own[i] = self->value[i];
}

void* shared_memory(int id, uint64_t bytes, uint64_t align) {
  Block& block = *current->block;
  if (!block.shared.count(id)) {
    block.wanted = id;
    block.wanted_bytes = bytes;
    block.wanted_align = align;
    leave(State::wants_memory);
  }
  __tsan_acquire(&block.shared);
  return block.shared[id];
}

dim3 thread_index() { return unfold(current->number, block_dim); }
dim3 block_index() { return unfold(current->block->number, grid_dim); }
dim3 block_size() { return block_dim; }
dim3 grid_size() { return grid_dim; }

void run(dim3 grid, dim3 block, uint64_t, const std::function<void()>& thread) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = uint64_t(block.x) * block.y * block.z;
  trouble.clear();
  if (blocks == 0 || threads == 0 || threads > 1024 || blocks > 0x7fffffff) {
    trouble = "a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads";
    return;
  }
  grid_dim = grid;
  block_dim = block;
  body = &thread;
  host_fiber = __tsan_get_current_fiber();
  __tsan_release(&launched);
  Grid(unsigned(blocks), unsigned(threads)).run();
}

}  // namespace cuda_host

cudaError_t cudaGetLastError() { return *cuda_host::problem() ? cudaErrorLaunchFailure : cudaSuccess; }
