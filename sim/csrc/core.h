// What the parts of the simulated accelerator share: commands, streams, events, captures.
//
// One mutex (`lock()`) guards all that the host does: submitting, allocating, clocks, captures.
// Worker threads never take it, and nobody waits for a worker while holding it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;

// ---- what a user sets -----------------------------------------------------------------------

enum class MemoryNumbers { Exact, Late, Negative, Lost };

struct Settings {
  uint64_t seed = 0;  // 0: no delays
  bool races = false;
  int devices = 2;
  size_t memory = size_t(1) << 30;  // bytes, of each device
  double timeout = 120;  // seconds that any wait may take
  MemoryNumbers numbers = MemoryNumbers::Exact;
};
Settings& settings();
std::recursive_mutex& lock();
using Locked = std::lock_guard<std::recursive_mutex>;

// ---- work -----------------------------------------------------------------------------------

struct Range {
  uintptr_t begin = 0, end = 0;
};
struct PinnedBlock;

// Fills memory with what nobody has written: 0x7FFF in each two bytes. In every floating-point format
// that is NaN, and as an integer of 16 bits or more neither an index nor a length, nor a -1, which
// may have a meaning.
void poison(Range range);

// A kernel with its arguments. It may run many times: a graph keeps it.
struct Command {
  std::string name;
  std::string where;  // in Python, while races are looked for
  std::vector<Range> reads, writes;
  std::vector<PinnedBlock*> pinned;  // host memory that it uses
  std::function<void()> run;
  bool reads_host = false;  // asynchronously: the host must leave `reads` alone until it has run
  bool is_work = true;  // false for what the allocator does
};
using CommandPtr = std::shared_ptr<const Command>;
using Clock = std::vector<uint64_t>;
void join(Clock& into, const Clock& other);

struct Stream;

// One recording of an event.
struct Moment {
  Stream* stream = nullptr;
  std::string behind;  // the last work before it
  std::mutex mutex;
  std::condition_variable happened;
  bool done = false;
  std::chrono::steady_clock::time_point time;
  Clock clock;
  uint64_t capture = 0;  // recorded in this capture; 0: in none
  size_t node = 0;
  std::vector<size_t> seen;  // of each lane of the capture: nodes that are done by then
};
using MomentPtr = std::shared_ptr<Moment>;

struct Event {
  MomentPtr moment;
};

struct Item {
  enum Kind { Run, Record, Wait } kind;
  CommandPtr command;
  MomentPtr moment;
  std::optional<uint64_t> content;  // checksum of the host memory that an asynchronous copy reads
};

struct Capture;

struct Stream {
  Stream(int device, int64_t id, size_t number) : device(device), id(id), number(number) {}
  const int device;
  const int64_t id;
  const size_t number;  // among the streams of all devices: its place in clocks
  Clock clock;
  Capture* capture = nullptr;
  std::string last;  // name of what was submitted last

  void push(Item item);
  uint64_t submitted();
  bool reached(uint64_t ticket);
  void wait_until(uint64_t ticket);  // raises after Settings::timeout
  void hold(bool held);  // what is queued does not begin until it is let go
  bool able();  // whether it has work that waits for nothing
  std::string name() const;
  c10::Stream as_c10() const;

 private:
  void work();
  void hesitate(bool started);
  void give_way();
  std::mutex mutex_;
  std::condition_variable more_, less_;
  std::deque<Item> items_;
  uint64_t submitted_ = 0, finished_ = 0;
  std::string running_ = "nothing";
  bool started_ = false, held_ = false, gives_way_ = false;
  MomentPtr awaited_;
  std::mt19937_64 random_;
  uint64_t seeded_ = 0;
};

Stream& stream_of(const c10::Stream& stream);
Stream& stream_at(int device, int64_t id);
Stream& graph_lane(int device, size_t number);
Stream& current_stream(int device);
std::vector<Stream*> streams_of(int device);
int64_t exchange_stream(int device, int64_t id);
int64_t new_stream_id(int device);
int current_device();
void set_current_device(int device);
int device_count();

void submit(Stream& stream, CommandPtr command);
void record(Event& event, Stream& stream);
void block(const Event& event, Stream& stream);
bool query(const Event& event);
void wait_for(const Event& event);
void wait_for(Stream& stream);
void wait_for_device(int device);
double milliseconds(const Event& begin, const Event& end);
bool is_idle(int device);
// Raises what a kernel of the device has raised since the last call.
void raise_failure(int device);
void note_failure(int device, std::string what);
// The process ends: no work is taken any more.
void stop();
bool stopped();

// ---- captures -------------------------------------------------------------------------------

struct Node {
  Item::Kind kind;
  size_t lane;
  CommandPtr command;
  size_t moment = 0;
};

struct Capture {
  uint64_t id;
  c10::MempoolId_t pool;
  std::vector<Stream*> lanes;  // the first is the stream on which it began
  std::vector<Node> nodes;
  std::vector<std::vector<size_t>> seen;  // of each lane, of each lane: nodes that it is behind
  std::string invalid;

  size_t lane_of(Stream& stream);
};
Capture* capture_of_thread();
// Raises if the calling thread captures, and makes that capture invalid.
void refuse_in_capture(const std::string& what, Stream& stream);

struct Graph {
  ~Graph();
  void begin(c10::MempoolId_t pool);
  void end();
  void replay();
  void reset();
  c10::MempoolId_t pool() const { return pool_; }

 private:
  std::unique_ptr<Capture> capture_;
  std::vector<Node> nodes_;
  size_t lanes_ = 0, moments_ = 0;
  uint64_t replays_ = 0;
  int device_ = 0;
  bool captured_ = false, pooled_ = false;
  c10::MempoolId_t pool_{0, 0};
};
c10::MempoolId_t new_pool();

// ---- memory ---------------------------------------------------------------------------------

c10::DeviceAllocator* device_allocator();
std::pair<size_t, size_t> memory_info(int device);
struct SegmentView {
  int device;
  uintptr_t address;
  size_t size;
  c10::MempoolId_t pool;
};
std::vector<SegmentView> segments();
void retain_pool(int device, c10::MempoolId_t pool);
void release_pool(int device, c10::MempoolId_t pool);
// Raises if device memory is used that the allocator has given back.
void check_mapped(const Command& command);
std::optional<int> device_of(const void* address);

struct PinnedBlock {
  unsigned char* data;
  size_t size;
  std::atomic<int> in_flight{0};
  bool in_use = true;
};
PinnedBlock* pinned_block(const void* address);
at::Allocator* host_allocator();

// ---- races ----------------------------------------------------------------------------------

namespace races {
// The caller holds lock().
void stamp(Stream& stream, const Command& command, std::optional<uint64_t>& content);
void host_saw(const Clock& clock);
const Clock& host_clock();
void forget(Range range);
void forget_all();
// Whether the host has seen the end of all that used the range.
bool quiet(Range range);
uint64_t checksum(Range range);
// Called by workers, too.
void report(std::string what);
std::vector<std::string> found(bool clear);
}  // namespace races

// ---- Python ---------------------------------------------------------------------------------

// The GIL is let go while it lives, if the thread had it: a kernel may need it.
struct WithoutGil {
  WithoutGil();
  ~WithoutGil();
  void* state = nullptr;
};
std::string python_place();

std::string text(Range range);

}  // namespace sim
