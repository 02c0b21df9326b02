// Graphs: what is submitted to the capturing stream, and to those that fork from it, again.
#include "core.h"

#include <c10/util/Exception.h>

namespace sim {
namespace {
thread_local Capture* t_capture = nullptr;
uint64_t g_next = 1;
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
  for (const Node& each : nodes_) {
    Stream& lane = *lanes[each.lane];
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
