// Ops: queued on the current stream, and run later by the CPU's kernels over the same bytes.
#include "ops.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

namespace sim {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

bool on_sim(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSim; }

// From the first byte of the tensor to the last.
Range range_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  const auto begin = uintptr_t(tensor.data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {begin, begin + size_t(last + 1) * tensor.itemsize()};
}

void run_boxed(const c10::OperatorHandle& op, Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  op.callBoxed(&stack);
}

}  // namespace

Tensor on_host(const Tensor& tensor) {
  const Range range = range_of(tensor);
  const size_t size = range.end - range.begin;
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), size,
      c10::DataPtr(reinterpret_cast<void*>(range.begin), c10::Device(c10::DeviceType::CPU)),
      nullptr, false);
  c10::InferenceMode no_inference(false);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return made;
}

void add_access(Command& command, const Tensor& tensor, bool writes) {
  const Range range = range_of(tensor);
  if (range.begin == range.end) return;
  (writes ? command.writes : command.reads).push_back(range);
}

void submit_on_current(int device, std::shared_ptr<Command> command) {
  submit(current_stream(device), std::move(command));
}

std::string place() { return settings().races ? python_place() : std::string(); }

namespace {

// ---- making tensors -------------------------------------------------------------------------

Tensor empty_memory_format(
    c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
    std::optional<c10::Device> device, std::optional<bool> pin,
    std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(layout.value_or(c10::kStrided) == c10::kStrided, "sim: only strided tensors");
  TORCH_CHECK(!pin.value_or(false), "sim: only tensors of the host can be pinned");
  const c10::DeviceGuard guard(device.value_or(c10::Device(kSim)));
  return at::detail::empty_generic(size, device_allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout> layout, std::optional<c10::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(layout.value_or(c10::kStrided) == c10::kStrided, "sim: only strided tensors");
  TORCH_CHECK(!pin.value_or(false), "sim: only tensors of the host can be pinned");
  const c10::DeviceGuard guard(device.value_or(c10::Device(kSim)));
  return at::detail::empty_strided_generic(size, stride, device_allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor new_like(const Tensor& meta, c10::Device device) {
  return empty_strided(meta.sizes(), meta.strides(), meta.scalar_type(), c10::kStrided, device,
                       false);
}

void grow_storage(const Tensor& tensor, size_t nbytes) {
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (nbytes <= storage->nbytes()) return;
  TORCH_CHECK(storage->resizable(), "sim: this storage cannot be resized");
  const c10::DeviceGuard guard(tensor.device());
  c10::DataPtr memory = device_allocator()->allocate(nbytes);
  const size_t kept = storage->nbytes();
  if (kept > 0) {
    auto command = std::make_shared<Command>();
    const auto from = uintptr_t(storage->data()), to = uintptr_t(memory.get());
    command->name = "aten::resize_";
    command->where = place();
    command->reads = {{from, from + kept}};
    command->writes = {{to, to + kept}};
    command->run = [from, to, kept] {
      std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), kept);
    };
    submit_on_current(tensor.device().index(), command);
  }
  storage->set_data_ptr_noswap(std::move(memory));
  storage->set_nbytes(nbytes);
}

size_t bytes_for(const Tensor& tensor, c10::IntArrayRef size, c10::IntArrayRef stride,
                 int64_t offset) {
  return at::detail::computeStorageNbytes(size, stride, tensor.itemsize(), offset);
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size,
                      std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(format.value_or(c10::MemoryFormat::Contiguous) == c10::MemoryFormat::Contiguous,
              "sim: resize_() to a memory format");
  if (self.sizes() == size) return self;
  const auto stride = at::detail::defaultStrides(size);
  grow_storage(self, bytes_for(self, size, stride, self.storage_offset()));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_storage_offset(Tensor& self, at::Storage storage, int64_t offset,
                           c10::IntArrayRef size, c10::IntArrayRef stride) {
  at::native::checkSetStorage(self, storage, offset, size, stride);
  const auto strides =
      stride.empty() && !size.empty() ? at::detail::defaultStrides(size) : stride.vec();
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, strides);
  if (self.numel() > 0) grow_storage(self, bytes_for(self, size, strides, offset));
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  const int64_t count = int64_t(storage.nbytes() / self.itemsize());
  return set_storage_offset(self, std::move(storage), 0, {count}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_offset(self, source.storage(), source.storage_offset(), source.sizes(),
                            source.strides());
}

Tensor& set_nothing(Tensor& self) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, device_allocator(), true);
  return set_storage_offset(self, storage, 0, {0}, {});
}

// ---- copies ---------------------------------------------------------------------------------

void copy_on_device(const Tensor& target, const Tensor& source) {
  const int to = target.device().index(), from = source.device().index();
  Stream& stream = current_stream(from);
  Stream& other = current_stream(to);
  auto command = std::make_shared<Command>();
  command->name = "aten::copy_";
  command->where = place();
  add_access(*command, source, false);
  add_access(*command, target, true);
  command->run = [a = on_host(target), b = on_host(source)] { a.copy_(b); };
  if (to == from) {
    submit(stream, command);
    return;
  }
  Event before, after;
  record(before, other);
  block(before, stream);
  submit(stream, command);
  record(after, stream);
  block(after, other);
}

void copy_to_device(const Tensor& target, const Tensor& source, bool asynchronous) {
  const int device = target.device().index();
  Stream& stream = current_stream(device);
  PinnedBlock* pinned = pinned_block(source.data_ptr());
  auto command = std::make_shared<Command>();
  command->name = "aten::copy_ to the device";
  command->where = place();
  add_access(*command, target, true);
  const bool direct = pinned != nullptr && asynchronous && source.is_contiguous() &&
                      source.scalar_type() == target.scalar_type();
  if (direct) {
    command->pinned = {pinned};
    command->reads_host = true;
    add_access(*command, source, false);
    command->run = [a = on_host(target), b = on_host(source)] { a.copy_(b); };
    submit(stream, command);
    return;
  }
  refuse_in_capture("a copy from memory of the host that is not pinned, or that waits,", stream);
  // Staged: the source may be written as soon as this returns.
  command->run = [a = on_host(target), b = source.clone()] { a.copy_(b); };
  submit(stream, command);
  if (!asynchronous) wait_for(stream);
}

void copy_to_host(const Tensor& target, const Tensor& source, bool asynchronous) {
  Stream& stream = current_stream(source.device().index());
  PinnedBlock* pinned = target.numel() > 0 ? pinned_block(target.data_ptr()) : nullptr;
  auto command = std::make_shared<Command>();
  command->name = "aten::copy_ to the host";
  command->where = place();
  add_access(*command, source, false);
  if (pinned != nullptr && asynchronous) {
    command->pinned = {pinned};
    add_access(*command, target, true);
    if (settings().races && target.is_contiguous() && stream.capture == nullptr) {
      // What is read too early is not what was there before.
      Locked guard(lock());
      const Range range = range_of(target);
      if (races::quiet(range)) poison(range);
    }
    command->run = [a = on_host(target), b = on_host(source)] { a.copy_(b); };
    submit(stream, command);
    return;
  }
  refuse_in_capture("reading a value on the host", stream);
  command->run = [a = on_host(target), b = on_host(source)] { a.copy_(b); };
  submit(stream, command);
  wait_for(stream);
}

Tensor& copy_(Tensor& self, const Tensor& given, bool non_blocking) {
  if (self.is_same(given)) return self;
  TORCH_CHECK(!given.is_conj() && !given.is_neg(), "sim: copies of lazy complex numbers");
  const Tensor source = given.expand(self.sizes());
  if (self.numel() == 0) return self;
  const c10::InferenceMode inference;
  if (on_sim(self) && on_sim(source))
    copy_on_device(self, source);
  else if (on_sim(self))
    copy_to_device(self, source, non_blocking);
  else
    copy_to_host(self, source, non_blocking);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  Tensor to = target;
  copy_(to, self, non_blocking);
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  Tensor to = target;
  to.resize_(self.sizes());
  return copy_(to, self, false);
}

c10::Scalar local_scalar_dense(const Tensor& self) {
  Tensor host = at::empty({1}, self.options().device(c10::kCPU));
  copy_to_host(host, self.reshape({1}), false);
  return at::_local_scalar_dense(host);
}

void record_stream(Tensor& self, c10::Stream stream) {
  device_allocator()->recordStream(self.storage().data_ptr(), stream);
}

// ---- all others -----------------------------------------------------------------------------

struct Call {
  const c10::OperatorHandle& op;
  const c10::FunctionSchema& schema;
  std::string name;
  c10::Device device{kSim, -1};
  std::unordered_map<c10::TensorImpl*, Tensor> metas, hosts;

  explicit Call(const c10::OperatorHandle& op)
      : op(op), schema(op.schema()), name(c10::toString(op.operator_name())) {}

  void meet(const Tensor& tensor) {
    if (!on_sim(tensor)) return;
    if (device.index() < 0) device = tensor.device();
    TORCH_CHECK(device == tensor.device(), name, ": tensors on ", device, " and ",
                tensor.device());
  }

  Tensor meta(const Tensor& tensor) {
    if (!on_sim(tensor)) return tensor;
    auto& made = metas[tensor.unsafeGetTensorImpl()];
    if (!made.defined()) {
      made = at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(),
                                            tensor.scalar_type());
      if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
        made.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    return made;
  }

  Tensor host(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    auto& made = hosts[tensor.unsafeGetTensorImpl()];
    if (!made.defined()) {
      made = on_sim(tensor) ? on_host(tensor) : tensor.clone();  // a number is what it is now
      if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
        made.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    return made;
  }

  using Change = std::function<Tensor(const Tensor&)>;

  static IValue each_tensor(const IValue& value, const Change& change) {
    if (value.isTensor()) {
      const Tensor& tensor = value.toTensor();
      return tensor.defined() ? IValue(change(tensor)) : value;
    }
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& tensor : value.toTensorVector()) made.push_back(change(tensor));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList().vec())
        made.push_back(tensor.has_value() && tensor->defined() ? std::optional(change(*tensor))
                                                              : tensor);
      return made;
    }
    return value;
  }

  Stack changed(const Stack& arguments, const Change& change, c10::Device where) const {
    Stack made;
    for (const IValue& each : arguments)
      made.push_back(each.isDevice() ? IValue(where) : each_tensor(each, change));
    return made;
  }

  bool writes(size_t argument) const {
    const auto* alias = schema.arguments()[argument].alias_info();
    return alias != nullptr && alias->isWrite();
  }
  // The argument that is returned as a result, or -1.
  int returned(size_t result) const {
    const auto* alias = schema.returns()[result].alias_info();
    if (alias == nullptr || !alias->isWrite()) return -1;
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const auto* other = schema.arguments()[i].alias_info();
      if (other != nullptr && other->beforeSets() == alias->beforeSets()) return int(i);
    }
    return -1;
  }
};

// Results depend on values: the host waits for them, as an accelerator's own op would.
void compute_now(Call& call, Stack& arguments, Stack& results) {
  Stream& stream = current_stream(call.device.index());
  refuse_in_capture(call.name + ", which reads values on the host,", stream);
  auto reading = std::make_shared<Command>();
  reading->name = call.name;
  reading->where = place();
  for (size_t i = 0; i < arguments.size(); ++i)
    Call::each_tensor(arguments[i], [&](const Tensor& tensor) {
      if (on_sim(tensor)) add_access(*reading, tensor, call.writes(i));
      return tensor;
    });
  reading->run = [] {};
  submit(stream, reading);
  wait_for(stream);
  Stack stack = call.changed(
      arguments, [&](const Tensor& tensor) { return call.host(tensor); }, c10::kCPU);
  run_boxed(call.op, stack);
  for (size_t i = 0; i < stack.size(); ++i) {
    const int argument = call.returned(i);
    if (argument >= 0) {
      const Tensor& target = arguments[argument].toTensor();
      TORCH_CHECK(target.sizes() == stack[i].toTensor().sizes(), "sim cannot run ", call.name,
                  " into a tensor of another size");
      results.push_back(arguments[argument]);
      continue;
    }
    results.push_back(Call::each_tensor(stack[i], [&](const Tensor& tensor) {
      Tensor made = new_like(tensor, call.device);
      return copy_(made, tensor, false);
    }));
  }
}

[[noreturn]] void cannot_queue(const Call& call, const char* why) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "sim cannot queue ", call.name,
                              ": nothing tells the shapes of its results without values (", why,
                              ")");
}

void run_meta(const Call& call, Stack& stack) {
  try {
    run_boxed(call.op, stack);
  } catch (const c10::NotImplementedError& error) {
    cannot_queue(call, error.what_without_backtrace());
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception& error) {  // of a meta kernel in Python
    if (std::string(error.what()).find("NotImplementedError") == std::string::npos) throw;
    cannot_queue(call, error.what());
  }
}

// What of an argument a meta kernel sees; false: it may see more.
bool describe(const IValue& value, std::string& into) {
  const auto number = [&](int64_t each) {
    into.append(reinterpret_cast<const char*>(&each), sizeof each);
  };
  const auto tensor = [&](const Tensor& each) {
    if (!each.defined()) return into += 'u', true;
    const bool number_of_host = each.is_cpu() && each.dim() == 0;
    if (!on_sim(each) && !number_of_host) return false;
    into += each.unsafeGetTensorImpl()->is_wrapped_number() ? 'w' : 't';
    into += number_of_host ? 'h' : 's';
    number(int64_t(each.scalar_type()));
    if (number_of_host)  // which it may read
      into.append(static_cast<const char*>(each.const_data_ptr()), each.itemsize());
    number(each.dim());
    for (const int64_t size : each.sizes()) number(size);
    for (const int64_t stride : each.strides()) number(stride);
    return true;
  };
  if (value.isNone()) return into += 'n', true;
  if (value.isTensor()) return tensor(value.toTensor());
  if (value.isBool()) return into += value.toBool() ? 'y' : 'f', true;
  if (value.isInt()) {
    into += 'i';
    number(value.toInt());
    return true;
  }
  if (value.isDouble()) {
    const double given = value.toDouble();
    into += 'd';
    into.append(reinterpret_cast<const char*>(&given), sizeof given);
    return true;
  }
  if (value.isDevice()) return into += 'D', true;  // the meta device, each time
  if (value.isString()) {
    into += 's';
    number(int64_t(value.toStringRef().size()));
    into += value.toStringRef();
    return true;
  }
  if (value.isList()) {
    into += 'l';
    number(int64_t(value.toListRef().size()));
    for (const IValue& each : value.toListRef())
      if (!describe(each, into)) return false;
    return true;
  }
  return false;
}

// Meta kernels are mostly Python, and slow: what one has said of such arguments is kept.
Stack shapes_of(Call& call, const Stack& arguments) {
  constexpr size_t kKept = 20000;
  static auto* kept = new std::unordered_map<std::string, Stack>();
  std::string key = call.name;
  key += char(c10::typeMetaToScalarType(c10::get_default_dtype()));
  bool known = true;
  for (const IValue& each : arguments) known = known && describe(each, key);
  if (known) {
    Locked guard(lock());
    const auto found = kept->find(key);
    if (found != kept->end()) return found->second;
  }
  Stack stack = call.changed(
      arguments, [&](const Tensor& tensor) { return call.meta(tensor); },
      c10::Device(c10::DeviceType::Meta));
  run_meta(call, stack);
  for (size_t i = 0; i < arguments.size() && known; ++i)
    known = !call.writes(i);  // such an output may be resized
  if (known) {
    Locked guard(lock());
    if (kept->size() >= kKept) kept->clear();
    kept->emplace(std::move(key), stack);
  }
  return stack;
}

// Whether all results are arguments, and of the size that they will have.
bool has_results(const Call& call, const Stack& arguments) {
  const bool in_place = call.name.find("out") == std::string::npos;
  for (size_t i = 0; i < call.schema.returns().size(); ++i) {
    const int argument = call.returned(i);
    if (argument < 0) return false;
    if (in_place) continue;
    if (!arguments[argument].isTensor() || arguments[argument].toTensor().numel() == 0)
      return false;
  }
  return true;
}

// Whether the shapes of results depend on values.
bool reads_values(const Call& call, const Stack& arguments) {
  for (const auto& each : call.schema.returns()) {
    const auto kind = each.type()->kind();
    if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType) return true;
  }
  if (call.op.hasTag(at::Tag::dynamic_output_shape) ||
      call.op.hasTag(at::Tag::data_dependent_output))
    return true;
  if (call.name.rfind("aten::index.Tensor", 0) != 0) return false;
  for (const std::optional<Tensor>& each : arguments[1].toOptionalTensorList().vec())
    if (each && each->defined() &&
        (each->scalar_type() == at::kBool || each->scalar_type() == at::kByte))
      return true;  // a mask
  return false;
}

void queue(Call& call, Stack& arguments, Stack& results) {
  const auto& schema = call.schema;
  Stack meta_stack(schema.returns().size());
  if (!has_results(call, arguments)) meta_stack = shapes_of(call, arguments);
  auto command = std::make_shared<Command>();
  command->name = call.name;
  command->where = place();
  for (size_t i = 0; i < arguments.size(); ++i) {
    Call::each_tensor(arguments[i], [&](const Tensor& tensor) {
      if (!on_sim(tensor)) {
        TORCH_CHECK(!call.writes(i), call.name, " cannot write into memory of the host");
        return tensor;
      }
      const auto meta = call.metas.find(tensor.unsafeGetTensorImpl());
      if (call.writes(i) && meta != call.metas.end() && meta->second.sizes() != tensor.sizes())
        at::native::resize_output(tensor, meta->second.sizes());
      add_access(*command, tensor, call.writes(i));
      return tensor;
    });
  }
  std::vector<std::vector<Tensor>> fresh;  // of each result: where it goes
  for (size_t i = 0; i < meta_stack.size(); ++i) {
    fresh.emplace_back();
    const int argument = call.returned(i);
    if (argument >= 0) {
      results.push_back(arguments[argument]);
      continue;
    }
    TORCH_CHECK_NOT_IMPLEMENTED(schema.returns()[i].alias_info() == nullptr, "sim cannot queue ",
                                call.name, ": it returns a view");
    results.push_back(Call::each_tensor(meta_stack[i], [&](const Tensor& meta) {
      Tensor made = new_like(meta, call.device);
      add_access(*command, made, true);
      fresh.back().push_back(on_host(made));
      return made;
    }));
  }
  Stack host_stack = call.changed(
      arguments, [&](const Tensor& tensor) { return call.host(tensor); }, c10::kCPU);
  if (call.op.hasTag(at::Tag::nondeterministic_seeded)) {
    refuse_in_capture(call.name + ", which draws random numbers on the host,",
                      current_stream(call.device.index()));
    bool given = false;
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (schema.arguments()[i].name() != "generator") continue;
      at::Generator generator = arguments[i].isNone()
                                          ? default_generator(call.device.index())
                                          : arguments[i].toGenerator();
      std::lock_guard<std::mutex> drawing(generator.mutex());
      const uint64_t seed = generator.get<at::CPUGeneratorImpl>()->random64();
      host_stack[i] = IValue(at::make_generator<at::CPUGeneratorImpl>(seed));
      given = true;
    }
    TORCH_CHECK_NOT_IMPLEMENTED(given, "sim cannot queue ", call.name, ": it takes no generator");
  }
  std::vector<std::pair<Tensor, std::vector<int64_t>>> kept;  // outputs, which must not be resized
  for (size_t i = 0; i < arguments.size(); ++i)
    if (call.writes(i) && host_stack[i].isTensor() && host_stack[i].toTensor().defined())
      kept.emplace_back(host_stack[i].toTensor(), host_stack[i].toTensor().sizes().vec());
  command->run = [op = call.op, host_stack, fresh, kept, name = call.name] {
    Stack stack = host_stack;
    run_boxed(op, stack);
    for (const auto& [target, sizes] : kept)
      TORCH_CHECK(target.sizes() == c10::IntArrayRef(sizes), name, " gave ", target.sizes(),
                  " where its output has ", sizes);
    for (size_t i = 0; i < fresh.size(); ++i) {
      if (fresh[i].empty()) continue;
      size_t number = 0;
      Call::each_tensor(stack[i], [&](const Tensor& tensor) {
        const Tensor& target = fresh[i][number++];
        TORCH_CHECK(target.sizes() == tensor.sizes(), name, " gave ", tensor.sizes(),
                    " where its meta kernel promised ", target.sizes());
        return target.copy_(tensor);
      });
    }
  };
  submit_on_current(call.device.index(), command);
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Call call(op);
  const size_t count = call.schema.arguments().size();
  Stack arguments(stack->end() - int64_t(count), stack->end());
  stack->erase(stack->end() - int64_t(count), stack->end());
  for (IValue& each : arguments) {
    Call::each_tensor(each, [&](const Tensor& tensor) {
      call.meet(tensor);
      return tensor;
    });
    if (each.isDevice() && each.toDevice().type() == kSim && call.device.index() < 0) {
      const auto given = each.toDevice();
      call.device = given.has_index() ? given : c10::Device(kSim, c10::DeviceIndex(current_device()));
    }
  }
  TORCH_CHECK_NOT_IMPLEMENTED(call.device.index() >= 0, "sim cannot queue ", call.name,
                              ": it has no tensor of a device");
  for (IValue& each : arguments)
    each = Call::each_tensor(each, [&](const Tensor& tensor) -> Tensor {
      if (on_sim(tensor) || tensor.dim() == 0) return tensor;
      // As for other accelerators, numbers of positions may come from the host.
      const bool index = call.name.find("index") != std::string::npos &&
                         !c10::isFloatingType(tensor.scalar_type());
      TORCH_CHECK(index, call.name, ": a tensor of shape ", tensor.sizes(), " is on ",
                  tensor.device(), ", others are on ", call.device);
      return tensor.to(call.device);
    });
  const c10::DeviceGuard guard(call.device);
  Stack results;
  if (reads_values(call, arguments))
    compute_now(call, arguments, results);
  else
    queue(call, arguments, results);
  for (IValue& each : results) stack->push_back(std::move(each));
}

int64_t sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                   double, bool, std::optional<double>, bool) {
  return int64_t(at::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_memory_format);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("resize_", resize_);
  m.impl("set_", set_nothing);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("record_stream", record_stream);
}

}  // namespace
}  // namespace sim

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sim::sdp_choice)
}  // namespace at::native
