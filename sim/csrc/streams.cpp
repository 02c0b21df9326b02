// Streams are worker threads with queues; events are marks in them.
#include "core.h"

#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <c10/util/thread_name.h>

#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <sstream>

namespace sim {
namespace {

constexpr int kMaxDevices = 8;
constexpr int64_t kPooled = 16;  // streams that users get, in turns, as CUDA's 32
constexpr size_t kLanes = 16;  // for the branches of graphs
constexpr auto kGivesWay = std::chrono::milliseconds(20);  // to other streams, at most

struct DeviceState {
  std::deque<Stream> streams;  // default, pooled, lanes
  int64_t next = 0;
  std::mutex mutex;
  std::string failure;
};

// Never destroyed: workers outlive static objects.
std::array<DeviceState, kMaxDevices>& states() {
  static auto* all = [] {
    auto* made = new std::array<DeviceState, kMaxDevices>();
    size_t number = 0;
    for (int device = 0; device < kMaxDevices; ++device)
      for (int64_t id = 0; id < int64_t(1 + kPooled + kLanes); ++id)
        (*made)[device].streams.emplace_back(device, id, number++);
    return made;
  }();
  return *all;
}

DeviceState& state(int device) {
  TORCH_CHECK(device >= 0 && device < device_count(), "sim:", device, " does not exist: there are ",
              device_count(), " devices (SIM_DEVICES)");
  return states()[device];
}

thread_local int t_device = 0;
thread_local std::array<int64_t, kMaxDevices> t_streams{};
std::atomic<bool> g_stopped{false};

std::chrono::duration<double> patience() {
  return std::chrono::duration<double>(settings().timeout);
}

uint64_t number_of(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == 0) return otherwise;
  char* end = nullptr;
  const auto value = std::strtoull(text, &end, 10);
  TORCH_CHECK(*end == 0, name, "=", text, " is no whole number");
  return value;
}

}  // namespace

Settings& settings() {
  static auto* made = [] {
    auto* s = new Settings();
    s->seed = number_of("SIM_SEED", 1);
    s->races = number_of("SIM_RACES", 0) != 0;
    s->devices = int(number_of("SIM_DEVICES", 2));
    TORCH_CHECK(s->devices >= 1 && s->devices <= kMaxDevices, "SIM_DEVICES must be 1 to ",
                kMaxDevices);
    s->memory = number_of("SIM_MEMORY", s->memory);
    s->timeout = double(number_of("SIM_TIMEOUT", uint64_t(s->timeout)));
    return s;
  }();
  return *made;
}

std::recursive_mutex& lock() {
  static auto* made = new std::recursive_mutex();
  return *made;
}

void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

int device_count() { return settings().devices; }
int current_device() { return t_device; }
void set_current_device(int device) {
  state(device);
  t_device = device;
}

Stream& stream_at(int device, int64_t id) {
  auto& streams = state(device).streams;
  TORCH_CHECK(id >= 0 && id < int64_t(streams.size()), "sim:", device, " has no stream ", id);
  return streams[id];
}
Stream& stream_of(const c10::Stream& stream) {
  TORCH_CHECK(stream.device_type() == kSim, stream, " is no stream of a sim device");
  return stream_at(stream.device_index(), stream.id());
}
Stream& graph_lane(int device, size_t number) {
  TORCH_CHECK(number < kLanes, "a graph has more than ", kLanes, " branches");
  return stream_at(device, int64_t(1 + kPooled + number));
}
Stream& current_stream(int device) { return stream_at(device, t_streams[device]); }
int64_t exchange_stream(int device, int64_t id) {
  stream_at(device, id);
  return std::exchange(t_streams[device], id);
}
int64_t new_stream_id(int device) {
  Locked guard(lock());
  return 1 + (state(device).next++ % kPooled);
}
std::vector<Stream*> streams_of(int device) {
  std::vector<Stream*> all;
  for (auto& each : state(device).streams) all.push_back(&each);
  return all;
}

// ---- a worker -------------------------------------------------------------------------------

std::string Stream::name() const {
  std::ostringstream out;
  out << "sim:" << device << " stream " << id;
  return out.str();
}
c10::Stream Stream::as_c10() const {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kSim, c10::DeviceIndex(device)), id);
}

void Stream::push(Item item) {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    items_.push_back(std::move(item));
    ++submitted_;
    if (!std::exchange(started_, true)) std::thread([this] { work(); }).detach();
  }
  more_.notify_one();
}

uint64_t Stream::submitted() {
  std::lock_guard<std::mutex> guard(mutex_);
  return submitted_;
}
bool Stream::reached(uint64_t ticket) {
  std::lock_guard<std::mutex> guard(mutex_);
  return finished_ >= ticket;
}
void Stream::wait_until(uint64_t ticket) {
  WithoutGil released;
  std::unique_lock<std::mutex> guard(mutex_);
  const bool done = less_.wait_for(guard, patience(), [&] { return finished_ >= ticket; });
  TORCH_CHECK(done, "sim: the host has waited ", settings().timeout, " s (SIM_TIMEOUT) for ",
              name(), ", which runs ", running_, " with ", submitted_ - finished_,
              " pieces of work to do");
}

void Stream::hold(bool held) {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    held_ = held;
  }
  more_.notify_one();
}

bool Stream::able() {
  std::lock_guard<std::mutex> guard(mutex_);
  if (gives_way_ || held_ || finished_ == submitted_) return false;
  if (awaited_ == nullptr) return true;
  std::lock_guard<std::mutex> other(awaited_->mutex);
  return awaited_->done;
}

// What other streams may do by now comes first, however late the host's system lets them: what does
// not wait for this stream then meets what this stream has not done.
void Stream::give_way() {
  const auto set = [this](bool gives_way) {
    std::lock_guard<std::mutex> guard(mutex_);
    gives_way_ = gives_way;
  };
  const auto end = std::chrono::steady_clock::now() + kGivesWay;
  const auto others = streams_of(device);
  set(true);
  while (std::chrono::steady_clock::now() < end &&
         std::any_of(others.begin(), others.end(), [](Stream* each) { return each->able(); }))
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  set(false);
}

// A kernel may take any time to begin: the longest after a pause, when nothing hides it.
void Stream::hesitate(bool rested) {
  const uint64_t seed = settings().seed;
  if (seed == 0) return;
  if (seed != seeded_) {
    random_.seed(seed * 1000003 + number);
    seeded_ = seed;
  }
  const uint64_t draw = random_();
  uint64_t microseconds = 0;
  if (draw % 400 == 0)
    microseconds = (draw >> 32) % 4000;
  else if (draw % 16 == 0 || (rested && draw % 2 == 0))
    microseconds = (draw >> 32) % 300;
  if (microseconds != 0) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
  if ((draw >> 16) % 8 == 0) give_way();
}

void Stream::work() {
  c10::setThreadName("sim-stream");
  c10::InferenceMode inference;
  bool rested = true;
  while (true) {
    Item item;
    {
      std::unique_lock<std::mutex> guard(mutex_);
      if (items_.empty() || held_) {
        rested = true;
        more_.wait(guard, [&] { return !items_.empty() && !held_; });
      }
      item = std::move(items_.front());
      items_.pop_front();
      running_ = item.kind == Item::Run ? item.command->name
                 : item.kind == Item::Wait
                     ? "a wait for an event of " + item.moment->stream->name() + " behind " +
                           item.moment->behind
                     : "an event";
      awaited_ = item.kind == Item::Wait ? item.moment : nullptr;
    }
    if (item.kind == Item::Run) {
      hesitate(rested);
      rested = false;
      const Command& command = *item.command;
      try {
        if (item.content && races::checksum(command.reads.back()) != *item.content)
          races::report("host: memory " + text(command.reads.back()) +
                        " was written while an asynchronous copy from it was outstanding: " +
                        command.name + " on " + name() + " at " + command.where);
        command.run();
      } catch (const c10::Error& error) {
        note_failure(device, command.name + " failed when it ran on " + name() + ": " +
                                 error.what_without_backtrace());
      } catch (const std::exception& error) {
        note_failure(device,
                     command.name + " failed when it ran on " + name() + ": " + error.what());
      }
      for (PinnedBlock* each : command.pinned) --each->in_flight;
    } else if (item.kind == Item::Record) {
      std::lock_guard<std::mutex> guard(item.moment->mutex);
      item.moment->done = true;
      item.moment->time = std::chrono::steady_clock::now();
      item.moment->happened.notify_all();
    } else {
      std::unique_lock<std::mutex> guard(item.moment->mutex);
      if (!item.moment->happened.wait_for(guard, patience(), [&] { return item.moment->done; }))
        note_failure(device, name() + " has waited " + std::to_string(settings().timeout) +
                                 " s (SIM_TIMEOUT) for an event of " +
                                 item.moment->stream->name() + " behind " + item.moment->behind);
    }
    // What the command holds is let go before anybody learns that it is done.
    item = Item{};
    {
      std::lock_guard<std::mutex> guard(mutex_);
      ++finished_;
      running_ = "nothing";
      awaited_ = nullptr;
    }
    less_.notify_all();
  }
}

// ---- what the host asks for -----------------------------------------------------------------

void note_failure(int device, std::string what) {
  std::lock_guard<std::mutex> guard(state(device).mutex);
  if (state(device).failure.empty()) state(device).failure = std::move(what);
}

void raise_failure(int device) {
  std::string what;
  {
    std::lock_guard<std::mutex> guard(state(device).mutex);
    what.swap(state(device).failure);
  }
  TORCH_CHECK(what.empty(), "sim: ", what);
}

void stop() { g_stopped = true; }
bool stopped() { return g_stopped; }

void submit(Stream& stream, CommandPtr command) {
  if (g_stopped) return;
  if (command->is_work) raise_failure(stream.device);  // the allocator has nobody to tell
  Locked guard(lock());
  check_mapped(*command);
  stream.last = command->name;
  if (Capture* capture = stream.capture) {
    const size_t lane = capture->lane_of(stream);
    for (PinnedBlock* each : command->pinned) ++each->in_flight;  // until the graph is reset
    capture->nodes.push_back({Item::Run, lane, std::move(command)});
    capture->seen[lane][lane] = capture->nodes.size();
    return;
  }
  Item item{Item::Run, command};
  if (settings().races) races::stamp(stream, *command, item.content);
  for (PinnedBlock* each : command->pinned) ++each->in_flight;
  stream.push(std::move(item));
}

void record(Event& event, Stream& stream) {
  Locked guard(lock());
  auto moment = std::make_shared<Moment>();
  moment->stream = &stream;
  moment->behind = stream.last.empty() ? "nothing" : stream.last;
  event.moment = moment;
  if (Capture* capture = stream.capture) {
    const size_t lane = capture->lane_of(stream);
    moment->capture = capture->id;
    moment->node = capture->nodes.size();
    capture->nodes.push_back({Item::Record, lane, nullptr, moment->node});
    capture->seen[lane][lane] = capture->nodes.size();
    moment->seen = capture->seen[lane];
    return;
  }
  if (g_stopped) {
    moment->done = true;
    return;
  }
  moment->clock = stream.clock;
  if (settings().races) join(moment->clock, races::host_clock());
  stream.push({Item::Record, nullptr, std::move(moment)});
}

void block(const Event& event, Stream& stream) {
  Locked guard(lock());
  const MomentPtr& moment = event.moment;
  if (moment == nullptr || g_stopped) return;
  if (moment->capture != 0) {
    Capture* capture = moment->stream->capture;
    TORCH_CHECK(capture != nullptr && capture->id == moment->capture, "sim: ", stream.name(),
                " cannot wait for an event of a capture that has ended: what it marks runs in "
                "replays alone");
    TORCH_CHECK(stream.capture == nullptr || stream.capture == capture, "sim: ", stream.name(),
                " is captured by another graph");
    const size_t lane = capture->lane_of(stream);  // forks, if it is the first
    capture->nodes.push_back({Item::Wait, lane, nullptr, moment->node});
    auto& seen = capture->seen[lane];
    for (size_t i = 0; i < moment->seen.size(); ++i) seen[i] = std::max(seen[i], moment->seen[i]);
    seen[lane] = capture->nodes.size();
    return;
  }
  if (stream.capture != nullptr) {
    stream.capture->invalid = "it waits for an event from outside of the capture";
    TORCH_CHECK(false, "sim: ", stream.name(), " is being captured and cannot wait for an event ",
                "that was recorded outside of the capture, behind ", moment->behind, " on ",
                moment->stream->name());
  }
  if (settings().races) join(stream.clock, moment->clock);
  stream.push({Item::Wait, nullptr, moment});
}

bool query(const Event& event) {
  const MomentPtr moment = event.moment;
  if (moment == nullptr || g_stopped) return true;
  refuse_in_capture("a query of an event", current_stream(current_device()));
  TORCH_CHECK(moment->capture == 0, "sim: an event that was captured happens in replays alone");
  {
    std::lock_guard<std::mutex> guard(moment->mutex);
    if (!moment->done) return false;
  }
  Locked guard(lock());
  races::host_saw(moment->clock);
  return true;
}

void wait_for(const Event& event) {
  const MomentPtr moment = event.moment;
  if (moment == nullptr || g_stopped) return;
  refuse_in_capture("a wait of the host for an event", current_stream(current_device()));
  TORCH_CHECK(moment->capture == 0, "sim: an event that was captured happens in replays alone");
  {
    WithoutGil released;
    std::unique_lock<std::mutex> guard(moment->mutex);
    const bool done = moment->happened.wait_for(guard, patience(), [&] { return moment->done; });
    TORCH_CHECK(done, "sim: the host has waited ", settings().timeout,
                " s (SIM_TIMEOUT) for an event of ", moment->stream->name(), " behind ",
                moment->behind);
  }
  {
    Locked guard(lock());
    races::host_saw(moment->clock);
  }
  raise_failure(moment->stream->device);
}

void wait_for(Stream& stream) {
  if (g_stopped) return;
  refuse_in_capture("a wait of the host for " + stream.name(), stream);
  uint64_t ticket;
  Clock clock;
  {
    Locked guard(lock());
    ticket = stream.submitted();
    clock = stream.clock;
  }
  stream.wait_until(ticket);
  {
    Locked guard(lock());
    races::host_saw(clock);
  }
  raise_failure(stream.device);
}

void wait_for_device(int device) {
  for (Stream* each : streams_of(device)) {
    if (each->capture == nullptr || each->capture == capture_of_thread()) wait_for(*each);
  }
}

bool is_idle(int device) {
  for (Stream* each : streams_of(device))
    if (!each->reached(each->submitted())) return false;
  return true;
}

double milliseconds(const Event& begin, const Event& end) {
  TORCH_CHECK(begin.moment && end.moment, "sim: both events must be recorded first");
  wait_for(begin);
  wait_for(end);
  return std::chrono::duration<double, std::milli>(end.moment->time - begin.moment->time).count();
}

}  // namespace sim
