// Graphs: what is submitted to the capturing stream, and to those that fork from it, again.
#include "core.h"

#include <c10/util/Exception.h>

#include <array>
#include <numeric>

namespace sim {
namespace {
thread_local Capture* t_capture = nullptr;
uint64_t g_next = 1;

// How a replay's branches run beside each other.
enum class Branches { First, Last, Free };

// Of two replays in a row one has its branches first, which shows most faults; and five turns, so that
// who looks at every second replay meets each kind too.
Branches branches_of(uint64_t replay) {
  constexpr std::array turns{Branches::First, Branches::Last, Branches::First, Branches::Free,
                             Branches::First};
  const uint64_t seed = settings().seed;
  return seed == 0 ? Branches::Free : turns[(seed + replay) % turns.size()];
}

// The nodes in an order that their lanes and events allow, with as much of the last (first) lanes
// as possible done before the others go on.
std::vector<size_t> ordered(const std::vector<Node>& nodes, size_t lanes, Branches branches) {
  std::vector<size_t> order;
  if (lanes == 1 || branches == Branches::Free) {
    order.resize(nodes.size());
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  std::vector<std::deque<size_t>> left(lanes);
  for (size_t i = 0; i < nodes.size(); ++i) left[nodes[i].lane].push_back(i);
  std::vector<bool> done(nodes.size());
  while (order.size() < nodes.size()) {
    const auto can = [&](size_t lane) {
      if (left[lane].empty()) return false;
      const Node& next = nodes[left[lane].front()];
      return next.kind != Item::Wait || done[next.moment];
    };
    size_t lane = branches == Branches::First ? lanes - 1 : 0;
    while (!can(lane)) lane += branches == Branches::First ? -1 : 1;
    order.push_back(left[lane].front());
    done[left[lane].front()] = true;
    left[lane].pop_front();
  }
  return order;
}

// What `later` gets from here on begins when `earlier` has done what it got. No event of the
// program says so: races are looked for as if this were not there.
void tie(Stream& earlier, Stream& later) {
  if (stopped()) return;
  auto moment = std::make_shared<Moment>();
  moment->stream = &earlier;
  moment->behind = earlier.last;
  earlier.push({Item::Record, nullptr, moment});
  later.push({Item::Wait, nullptr, moment});
}
}  // namespace

Capture* capture_of_thread() { return t_capture; }

c10::MempoolId_t new_pool() {
  Locked guard(lock());
  return {0, g_next++};
}

size_t Capture::lane_of(Stream& stream) {
  for (size_t i = 0; i < lanes.size(); ++i)
    if (lanes[i] == &stream) return i;
  stream.capture = this;
  lanes.push_back(&stream);
  for (auto& each : seen) each.push_back(0);
  seen.emplace_back(lanes.size(), 0);
  return lanes.size() - 1;
}

void refuse_in_capture(const std::string& what, Stream& stream) {
  Capture* capture = t_capture != nullptr ? t_capture : stream.capture;
  if (capture == nullptr) return;
  capture->invalid = what;
  TORCH_CHECK(false, "sim: ", what, " is not permitted while a graph is captured");
}

Graph::~Graph() { reset(); }

void Graph::begin(c10::MempoolId_t pool) {
  TORCH_CHECK(!captured_ && capture_ == nullptr, "sim: this graph was captured before");
  TORCH_CHECK(t_capture == nullptr, "sim: the thread captures another graph");
  device_ = current_device();
  Stream& stream = current_stream(device_);
  Locked guard(lock());
  TORCH_CHECK(stream.id != 0, "sim: graphs are not captured on the default stream");
  TORCH_CHECK(stream.capture == nullptr, "sim: ", stream.name(), " is being captured");
  if (pool == c10::MempoolId_t{0, 0}) pool = new_pool();
  pool_ = pool;
  retain_pool(device_, pool_);
  pooled_ = true;
  capture_ = std::make_unique<Capture>();
  capture_->id = g_next++;
  capture_->pool = pool;
  capture_->lane_of(stream);
  t_capture = capture_.get();
}

void Graph::end() {
  TORCH_CHECK(capture_ != nullptr, "sim: capture_end() without capture_begin()");
  TORCH_CHECK(t_capture == capture_.get(), "sim: another thread began the capture");
  std::unique_lock<std::recursive_mutex> guard(lock());
  const auto capture = std::move(capture_);
  t_capture = nullptr;
  for (Stream* each : capture->lanes) each->capture = nullptr;
  nodes_ = std::move(capture->nodes);
  lanes_ = capture->lanes.size();
  captured_ = true;
  std::string wrong;
  if (!capture->invalid.empty()) wrong = "what was refused in it: " + capture->invalid;
  for (size_t lane = 1; lane < lanes_ && wrong.empty(); ++lane)
    if (capture->seen[0][lane] < capture->seen[lane][lane])
      wrong = capture->lanes[lane]->name() + " has work behind " + capture->lanes[lane]->last +
              " that the capturing stream does not wait for";
  guard.unlock();  // a warning, and the end of what a kernel holds, may need the GIL
  if (!wrong.empty()) {
    reset();
    TORCH_CHECK(false, "sim: the capture is invalid by ", wrong);
  }
  moments_ = nodes_.size();
  bool work = false;
  for (const Node& each : nodes_) work |= each.kind == Item::Run && each.command->is_work;
  if (!work) TORCH_WARN("The captured graph is empty.");
}

void Graph::replay() {
  TORCH_CHECK(captured_, "sim: replay() of a graph that was not captured");
  Stream& stream = current_stream(device_);
  refuse_in_capture("the replay of a graph", stream);
  Locked guard(lock());
  std::vector<Event> events(moments_);
  std::vector<Stream*> lanes{&stream};
  for (size_t i = 1; i < lanes_; ++i) lanes.push_back(&graph_lane(device_, i - 1));
  // As one: no branch begins late because the host has not come to it yet.
  struct Held {
    const std::vector<Stream*>& lanes;
    explicit Held(const std::vector<Stream*>& lanes) : lanes(lanes) {
      for (Stream* each : lanes) each->hold(true);
    }
    ~Held() {
      for (auto each = lanes.rbegin(); each != lanes.rend(); ++each) (*each)->hold(false);
    }
  } held(lanes);
  // What a missing wait may do, it does in some replay, however fast or busy the machine is: one
  // branch goes as far as its waits let it before another begins.
  const Branches branches = branches_of(replays_++);
  Stream* before = &stream;
  for (const size_t index : ordered(nodes_, lanes_, branches)) {
    const Node& each = nodes_[index];
    Stream& lane = *lanes[each.lane];
    if (branches != Branches::Free && &lane != before) tie(*before, lane);
    before = &lane;
    if (each.kind == Item::Run)
      submit(lane, each.command);
    else if (each.kind == Item::Record)
      record(events[each.moment], lane);
    else
      block(events[each.moment], lane);
  }
}

void Graph::reset() {
  std::vector<Node> gone;  // without the lock: what kernels hold may need the GIL
  Locked guard(lock());
  if (capture_ != nullptr) {
    for (Stream* each : capture_->lanes) each->capture = nullptr;
    if (t_capture == capture_.get()) t_capture = nullptr;
    nodes_ = std::move(capture_->nodes);
    capture_.reset();
  }
  for (const Node& each : nodes_)
    if (each.command != nullptr)
      for (PinnedBlock* block : each.command->pinned) --block->in_flight;
  gone.swap(nodes_);
  captured_ = false;
  if (std::exchange(pooled_, false)) release_pool(device_, pool_);
}

}  // namespace sim
