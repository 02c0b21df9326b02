// Memory of the devices and page-locked memory of the host.
//
// What is freed goes back to the stream that it was allocated on, is overwritten there, and is
// given out again in that stream's order: work of other streams must be ordered by events before
// it is freed, or be named by record_stream().
#include "ops.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <set>

namespace sim {
namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kSegment = size_t(2) << 20;
constexpr size_t kPoisonedWhenNew = size_t(32) << 20;
constexpr size_t kStale = size_t(64) << 20;  // by how much a driver's number may be off

using Pool = c10::MempoolId_t;
struct Segment;

struct Block {
  uintptr_t address = 0;
  size_t size = 0;
  Segment* segment = nullptr;
  bool allocated = false;
  Block *before = nullptr, *behind = nullptr;
  std::set<Stream*> used_on;
  std::vector<Event> awaited;  // freed, but work of other streams may still use it
};

struct Segment {
  int device = 0;
  uintptr_t address = 0;
  size_t size = 0;
  Pool pool;
  Stream* stream = nullptr;
  Block* first = nullptr;
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return std::pair(a->size, a->address) < std::pair(b->size, b->address);
  }
};

struct DeviceMemory {
  std::map<std::pair<Pool, Stream*>, std::set<Block*, BySize>> free;
  std::vector<Block*> deferred;
  std::map<Pool, int> pools;  // graphs that use it
  size_t reserved = 0, allocated = 0;
  size_t peak_reserved = 0, peak_allocated = 0;
  size_t seen = 0;  // what was reserved when somebody asked last
  int asked = 0;
};

std::map<uintptr_t, Segment*>& all_segments() {
  static auto* all = new std::map<uintptr_t, Segment*>();
  return *all;
}
DeviceMemory& memory_of(int device) {
  static auto* all = new std::array<DeviceMemory, 8>();
  return (*all)[device];
}

Segment* segment_at(uintptr_t address) {
  auto& all = all_segments();
  auto next = all.upper_bound(address);
  if (next == all.begin()) return nullptr;
  Segment* found = std::prev(next)->second;
  return address < found->address + found->size ? found : nullptr;
}

size_t rounded(size_t size, size_t to) { return (size + to - 1) / to * to; }

bool unused(const Segment& segment) {
  return !segment.first->allocated && segment.first->behind == nullptr &&
         segment.first->awaited.empty();
}

// The caller has seen the device idle.
void give_back(Segment* segment) {
  DeviceMemory& memory = memory_of(segment->device);
  memory.free[{segment->pool, segment->stream}].erase(segment->first);
  memory.reserved -= segment->size;
  all_segments().erase(segment->address);
  races::forget({segment->address, segment->address + segment->size});
  munmap(reinterpret_cast<void*>(segment->address), segment->size);
  delete segment->first;
  delete segment;
}

void release_unused(int device) {
  const auto only_unused = [&](const Segment& each) {
    const Pool none{0, 0};
    const auto& pools = memory_of(device).pools;
    return each.device == device && unused(each) && (each.pool == none || !pools.count(each.pool));
  };
  std::vector<Segment*> found;
  for (auto& each : all_segments())
    if (only_unused(*each.second)) found.push_back(each.second);
  for (Segment* each : found) give_back(each);
}

void absorb_behind(Block* block) {
  Block* other = block->behind;
  block->size += other->size;
  block->behind = other->behind;
  if (block->behind != nullptr) block->behind->before = block;
  delete other;
}

void make_free(Block* block) {
  Segment* segment = block->segment;
  auto& list = memory_of(segment->device).free[{segment->pool, segment->stream}];
  const auto idle = [](Block* each) {
    return each != nullptr && !each->allocated && each->awaited.empty();
  };
  if (Block* other = block->behind; idle(other)) {
    list.erase(other);
    absorb_behind(block);
  }
  if (Block* other = block->before; idle(other)) {
    list.erase(other);
    absorb_behind(other);
    block = other;
  }
  list.insert(block);
}

// Overwrites freed memory, in the order of its stream.
void spoil(Block* block, const std::string& where) {
  Segment* segment = block->segment;
  Stream& stream = *segment->stream;
  const bool pooled = segment->pool != Pool{0, 0};
  // A graph's memory is its own after the capture, and others' is none of the graph's.
  if (pooled != (stream.capture != nullptr)) return;
  if (pooled && stream.capture->pool != segment->pool) return;
  // On a branch it would be work that nobody waits for.
  if (pooled && stream.capture->lanes.front() != &stream) return;
  auto command = std::make_shared<Command>();
  const Range range{block->address, block->address + block->size};
  command->name = "the release of memory";
  command->where = where;
  command->writes = {range};
  command->is_work = false;
  command->run = [range] {
    poison(range);
  };
  submit(stream, command);
}

void process_deferred(int device) {
  DeviceMemory& memory = memory_of(device);
  std::vector<Block*> left;
  for (Block* block : memory.deferred) {
    bool done = true;
    for (const Event& each : block->awaited) {
      std::lock_guard<std::mutex> guard(each.moment->mutex);
      done &= each.moment->done;
    }
    if (!done) {
      left.push_back(block);
      continue;
    }
    for (const Event& each : block->awaited) races::host_saw(each.moment->clock);
    block->awaited.clear();
    spoil(block, "");
    make_free(block);
  }
  memory.deferred.swap(left);
}

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  if (stopped()) return;
  const std::string where = place();
  Locked guard(lock());
  Segment* segment = block->segment;
  DeviceMemory& memory = memory_of(segment->device);
  block->allocated = false;
  memory.allocated -= block->size;
  for (Stream* each : std::exchange(block->used_on, {})) {
    if (each == segment->stream || each->capture != nullptr) continue;
    block->awaited.emplace_back();
    record(block->awaited.back(), *each);
  }
  try {
    if (block->awaited.empty()) {
      spoil(block, where);
      make_free(block);
    } else {
      memory.deferred.push_back(block);
    }
  } catch (const std::exception& error) {
    // A destructor may not throw: whoever waits for the device next gets it.
    note_failure(segment->device, error.what());
    make_free(block);
  }
}

struct DeviceMemoryAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    const int device = current_device();
    const c10::Device where(kSim, c10::DeviceIndex(device));
    if (size == 0) return {nullptr, nullptr, &release_nothing, where};
    Block* block = take(device, rounded(size, kAlignment));
    return {reinterpret_cast<void*>(block->address), block, &release, where};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "sim: the allocator copies no memory");
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    for (int device = 0; device < device_count(); ++device) {
      refuse_in_capture("emptying the cache", current_stream(device));
      while (true) {
        wait_for_device(device);
        Locked guard(lock());
        process_deferred(device);
        if (!is_idle(device)) continue;
        release_unused(device);
        break;
      }
    }
  }
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    Locked guard(lock());
    if (pointer.get_deleter() != &release) return;
    static_cast<Block*>(pointer.get_context())->used_on.insert(&stream_of(stream));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    Locked guard(lock());
    const DeviceMemory& memory = memory_of(device);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* each : {&stats.allocated_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*each)[0].current = int64_t(memory.allocated);
      (*each)[0].peak = int64_t(memory.peak_allocated);
    }
    stats.reserved_bytes[0].current = int64_t(memory.reserved);
    stats.reserved_bytes[0].peak = int64_t(memory.peak_reserved);
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    Locked guard(lock());
    DeviceMemory& memory = memory_of(device);
    memory.peak_allocated = memory.allocated;
    memory.peak_reserved = memory.reserved;
  }
  // No `override`: older torch does not ask.
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) { return memory_info(device); }

 private:
  static void release_nothing(void*) {}

  Block* take(int device, size_t size) {
    Stream& stream = current_stream(device);
    if (Block* found = try_take(device, stream, size, false)) return found;
    if (capture_of_thread() == nullptr) {
      emptyCache();
      if (Block* found = try_take(device, stream, size, false)) return found;
    }
    return try_take(device, stream, size, true);
  }

  Block* try_take(int device, Stream& stream, size_t size, bool last) {
    Locked guard(lock());
    Pool pool{0, 0};
    if (stream.capture != nullptr)
      pool = stream.capture->pool;
    else if (capture_of_thread() != nullptr)
      refuse_in_capture("an allocation outside of the graph's pool, on " + stream.name() +
                            ", which is not captured,",
                        stream);
    DeviceMemory& memory = memory_of(device);
    process_deferred(device);
    auto& list = memory.free[{pool, &stream}];
    Block wanted;
    wanted.size = size;
    auto found = list.lower_bound(&wanted);
    Block* block;
    if (found != list.end()) {
      block = *found;
      list.erase(found);
    } else {
      block = grow(device, stream, pool, size, last);
      if (block == nullptr) return nullptr;
    }
    if (block->size >= size + kAlignment) {
      auto* rest = new Block{block->address + size, block->size - size, block->segment};
      rest->before = block;
      rest->behind = block->behind;
      if (rest->behind != nullptr) rest->behind->before = rest;
      block->behind = rest;
      block->size = size;
      list.insert(rest);
    }
    block->allocated = true;
    memory.allocated += block->size;
    memory.peak_allocated = std::max(memory.peak_allocated, memory.allocated);
    return block;
  }

  Block* grow(int device, Stream& stream, Pool pool, size_t size, bool last) {
    DeviceMemory& memory = memory_of(device);
    const size_t total = rounded(size, kSegment);
    if (memory.reserved + total > settings().memory) {
      TORCH_CHECK_WITH(OutOfMemoryError, !last, "sim: out of memory on sim:", device, ": ", size,
                       " bytes are asked for, ", settings().memory - memory.reserved, " of ",
                       settings().memory, " are free");
      return nullptr;
    }
    void* address = mmap(nullptr, total, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, address != MAP_FAILED, "sim: the host has no memory left");
    poison({uintptr_t(address), uintptr_t(address) + std::min(total, kPoisonedWhenNew)});
    auto* segment = new Segment{device, uintptr_t(address), total, pool, &stream};
    auto* block = new Block{segment->address, total, segment};
    segment->first = block;
    all_segments()[segment->address] = segment;
    memory.reserved += total;
    memory.peak_reserved = std::max(memory.peak_reserved, memory.reserved);
    return block;
  }
};

// ---- the host's -----------------------------------------------------------------------------

std::map<uintptr_t, PinnedBlock*>& pinned_blocks() {
  static auto* all = new std::map<uintptr_t, PinnedBlock*>();
  return *all;
}

void release_pinned(void* context) {
  Locked guard(lock());
  // It is given out again once all copies that use it have run.
  static_cast<PinnedBlock*>(context)->in_use = false;
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device host(c10::DeviceType::CPU);
    if (size == 0) return {nullptr, host};
    size_t wanted = 64;
    while (wanted < size) wanted *= 2;
    Locked guard(lock());
    PinnedBlock* block = nullptr;
    for (auto& [address, each] : pinned_blocks())
      if (!each->in_use && each->in_flight == 0 && each->size == wanted) block = each;
    if (block == nullptr) {
      block = new PinnedBlock{static_cast<unsigned char*>(c10::alloc_cpu(wanted)), wanted};
      pinned_blocks()[uintptr_t(block->data)] = block;
    }
    block->in_use = true;
    const auto begin = uintptr_t(block->data);
    poison({begin, begin + std::min(wanted, kPoisonedWhenNew)});
    races::forget({begin, begin + wanted});
    return {block->data, block, &release_pinned, host};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t size) const override {
    std::memcpy(target, source, size);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {
    Locked guard(lock());
    auto& all = pinned_blocks();
    for (auto each = all.begin(); each != all.end();) {
      PinnedBlock* block = each->second;
      if (block->in_use || block->in_flight != 0) {
        ++each;
        continue;
      }
      c10::free_cpu(block->data);
      delete block;
      each = all.erase(each);
    }
  }
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

}  // namespace

c10::DeviceAllocator* device_allocator() {
  static auto* made = new DeviceMemoryAllocator();
  return made;
}
at::Allocator* host_allocator() {
  static auto* made = [] {
    auto* allocator = new PinnedAllocator();
    at::setHostAllocator(kSim, allocator);
    return allocator;
  }();
  return made;
}

PinnedBlock* pinned_block(const void* address) {
  Locked guard(lock());
  auto& all = pinned_blocks();
  auto next = all.upper_bound(uintptr_t(address));
  if (next == all.begin()) return nullptr;
  PinnedBlock* found = std::prev(next)->second;
  const bool inside = uintptr_t(address) < uintptr_t(found->data) + found->size;
  return inside ? found : nullptr;
}

void retain_pool(int device, c10::MempoolId_t pool) { ++memory_of(device).pools[pool]; }
void release_pool(int device, c10::MempoolId_t pool) {
  auto& pools = memory_of(device).pools;
  if (--pools[pool] == 0) pools.erase(pool);
}

std::pair<size_t, size_t> memory_info(int device) {
  Locked guard(lock());
  DeviceMemory& memory = memory_of(device);
  size_t used = memory.reserved;
  ++memory.asked;
  switch (settings().numbers) {
    case MemoryNumbers::Exact:
      break;
    case MemoryNumbers::Late:  // as it was when somebody asked last
      used = std::exchange(memory.seen, used);
      break;
    case MemoryNumbers::Negative:  // what others free lets the number rise while memory is taken
      used -= std::min(used, size_t(memory.asked) * kStale);
      break;
    case MemoryNumbers::Lost:
      TORCH_CHECK(false, "sim: the driver does not know how much memory is free");
  }
  return {settings().memory - std::min(settings().memory, used), settings().memory};
}

std::vector<SegmentView> segments() {
  Locked guard(lock());
  std::vector<SegmentView> all;
  for (auto& [address, each] : all_segments())
    all.push_back({each->device, address, each->size, each->pool});
  return all;
}

std::optional<int> device_of(const void* address) {
  Locked guard(lock());
  Segment* found = segment_at(uintptr_t(address));
  if (found == nullptr) return std::nullopt;
  return found->device;
}

void poison(Range range) {
  // An even address has the lower byte.
  const auto byte_at = [](uintptr_t address) -> unsigned char { return address % 2 ? 0x7F : 0xFF; };
  auto begin = range.begin, end = range.end;
  if (begin < end && begin % 2) *reinterpret_cast<unsigned char*>(begin) = byte_at(begin), ++begin;
  if (begin < end && end % 2) --end, *reinterpret_cast<unsigned char*>(end) = byte_at(end);
  std::fill(reinterpret_cast<uint16_t*>(begin), reinterpret_cast<uint16_t*>(end), 0x7FFF);
}

void check_mapped(const Command& command) {
  for (const auto* ranges : {&command.reads, &command.writes})
    for (const Range& each : *ranges) {
      if (each.end == each.begin || pinned_block(reinterpret_cast<void*>(each.begin))) continue;
      Segment* found = segment_at(each.begin);
      TORCH_CHECK(found != nullptr && each.end <= found->address + found->size,
                  "sim: illegal memory access: ", command.name, " uses ", text(each),
                  ", which is no memory of a device (any more)");
    }
}

}  // namespace sim
