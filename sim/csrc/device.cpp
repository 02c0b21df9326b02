// What torch asks of a device: its guard, its hooks, its generators, its graphs.
#include "ops.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#if __has_include(<ATen/core/GraphImplInterface.h>)
#include <ATen/core/GraphImplInterface.h>
#define SIM_HAS_NEUTRAL_GRAPHS
#endif

namespace sim {
namespace {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return c10::Device(kSim, c10::DeviceIndex(current_device()));
  }
  void setDevice(c10::Device device) const override {
    if (device.has_index()) set_current_device(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index() && device.index() < sim::device_count())
      set_current_device(device.index());
  }
  c10::Stream getStream(c10::Device device) const override {
    return current_stream(device.has_index() ? device.index() : current_device()).as_c10();
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_at(device.has_index() ? device.index() : current_device(), 0).as_c10();
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    const int index = device.has_index() ? device.index() : current_device();
    return stream_at(index, new_stream_id(index)).as_c10();
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const int device = stream.device_index();
    return stream_at(device, exchange_stream(device, stream.id())).as_c10();
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return &stream_of(stream);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event();
    sim::record(*static_cast<Event*>(*event), stream_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) sim::block(*static_cast<Event*>(event), stream_of(stream));
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || query(*static_cast<Event*>(event));
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return c10::DeviceIndex(sim::device_count());
  }
  bool queryStream(const c10::Stream& stream) const override {
    Stream& found = stream_of(stream);
    return found.reached(found.submitted());
  }
  void synchronizeStream(const c10::Stream& stream) const override { wait_for(stream_of(stream)); }
  // torch 2.11 does not ask this yet, so it overrides nothing there.
  virtual bool isStreamCapturing(const c10::Stream& stream) const {
    return stream_of(stream).capture != nullptr;
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) wait_for(*static_cast<Event*>(event));
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override { wait_for_device(device); }
  void recordDataPtrOnStream(const c10::DataPtr& pointer,
                             const c10::Stream& stream) const override {
    device_allocator()->recordStream(pointer, stream);
  }
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    TORCH_CHECK(begin != nullptr && end != nullptr, "sim: both events must be recorded first");
    return milliseconds(*static_cast<Event*>(begin), *static_cast<Event*>(end));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(int device) {
    device_ = c10::Device(kSim, c10::DeviceIndex(device));
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return c10::DeviceIndex(sim::device_count()); }
  void setCurrentDevice(c10::DeviceIndex device) const override { set_current_device(device); }
  c10::DeviceIndex getCurrentDevice() const override {
    return c10::DeviceIndex(current_device());
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const auto before = getCurrentDevice();
    set_current_device(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? getCurrentDevice() : exchangeDevice(device);
  }
  bool isPinnedPtr(const void* pointer) const override { return pinned_block(pointer) != nullptr; }
  at::Allocator* getPinnedMemoryAllocator() const override { return host_allocator(); }
  c10::Device getDeviceFromPtr(void* pointer) const override {
    const auto found = device_of(pointer);
    TORCH_CHECK(found.has_value(), "sim: this address is no memory of a device");
    return c10::Device(kSim, c10::DeviceIndex(*found));
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device < 0 ? current_device() : device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current_device() : device);
  }
};

#ifdef SIM_HAS_NEUTRAL_GRAPHS
struct NeutralGraph final : at::GraphImplInterface {
  explicit NeutralGraph(const at::GraphImplArgs& = {}) {}
  void capture_begin(c10::MempoolId_t pool, at::GraphCaptureMode) override { graph.begin(pool); }
  void capture_end() override { graph.end(); }
  void instantiate() override {}
  void replay() override { graph.replay(); }
  void reset() override { graph.reset(); }
  c10::MempoolId_t pool() const override { return graph.pool(); }
  void enable_debug_mode() override {}
  void debug_dump(const std::string&) override {
    TORCH_CHECK(false, "sim: graphs cannot be dumped");
  }
  Graph graph;
};
#endif

const bool registered = [] {
  c10::SetAllocator(kSim, device_allocator());
  host_allocator();
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace

const at::Generator& default_generator(int device) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>();
    for (int i = 0; i < sim::device_count(); ++i)
      made->push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all->at(device);
}

}  // namespace sim

#ifdef SIM_HAS_NEUTRAL_GRAPHS
namespace at {
// Under the name that the device has with torch.
C10_REGISTER_CLASS(GraphImplRegistry, SIM, sim::NeutralGraph)
}
#endif
