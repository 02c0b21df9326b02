// What Python sees.
#include "ops.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace sim {

WithoutGil::WithoutGil() {
  if (Py_IsInitialized() && PyGILState_Check()) state = PyEval_SaveThread();
}
WithoutGil::~WithoutGil() {
  if (state != nullptr) PyEval_RestoreThread(static_cast<PyThreadState*>(state));
}

std::string python_place() {
  if (!Py_IsInitialized() || stopped()) return "";
  const PyGILState_STATE held = PyGILState_Ensure();
  PyObject *type, *value, *trace;  // memory is freed while errors are on their way, too
  PyErr_Fetch(&type, &value, &trace);
  std::string found;
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  int left = 3;  // the line, and who called it
  while (frame != nullptr) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const char* text = PyUnicode_AsUTF8(code->co_filename);
    const std::string file = text == nullptr ? "" : text;
    const bool ours = file.find("/torch/") == std::string::npos &&
                      file.find("reprise_sim/") == std::string::npos && file[0] != '<';
    if (ours) {
      // Enough of the path to find the file, and none of the directories of this machine.
      size_t cut = file.rfind('/');
      if (cut != std::string::npos && cut > 0) cut = file.rfind('/', cut - 1);
      const char* name = PyUnicode_AsUTF8(code->co_name);
      if (!found.empty()) found += " < ";
      found += file.substr(cut == std::string::npos ? 0 : cut + 1) + ":" +
               std::to_string(PyFrame_GetLineNumber(frame)) + " in " + (name ? name : "?");
      --left;
    }
    Py_DECREF(code);
    PyFrameObject* outer = left == 0 ? nullptr : PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = outer;
  }
  PyErr_Restore(type, value, trace);
  PyGILState_Release(held);
  return found;
}

namespace {

// A Python object that any thread may let go.
std::shared_ptr<PyObject> held(py::object object) {
  return {object.release().ptr(), [](PyObject* each) {
            if (!Py_IsInitialized() || stopped()) return;
            const PyGILState_STATE state = PyGILState_Ensure();
            Py_DECREF(each);
            PyGILState_Release(state);
          }};
}

// Queue `function(*arguments)` as one kernel: a worker calls it with the tensors' bytes as tensors
// of the CPU. `written` are the places of the arguments that it writes.
void launch(const std::string& name, py::object function, py::tuple arguments,
            const std::vector<size_t>& written) {
  auto command = std::make_shared<Command>();
  command->name = name;
  command->where = place();
  std::optional<c10::Device> device;
  py::tuple given(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    given[i] = arguments[i];
    if (!THPVariable_Check(arguments[i].ptr())) continue;
    const at::Tensor& tensor = THPVariable_Unpack(arguments[i].ptr());
    if (tensor.device().type() != kSim) {
      TORCH_CHECK(tensor.device().is_cpu() && tensor.dim() == 0, name, ": argument ", i, " is on ",
                  tensor.device());
      continue;
    }
    TORCH_CHECK(!device || *device == tensor.device(), name, ": tensors on ", *device, " and ",
                tensor.device());
    device = tensor.device();
    add_access(*command, tensor,
               std::find(written.begin(), written.end(), i) != written.end());
    given[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(on_host(tensor)));
  }
  TORCH_CHECK(device.has_value(), name, " has no tensor of a sim device");
  auto call = held(py::make_tuple(function, given));
  command->run = [call] {
    const PyGILState_STATE state = PyGILState_Ensure();
    std::string wrong;
    {
      PyObject* result =
          PyObject_CallObject(PyTuple_GetItem(call.get(), 0), PyTuple_GetItem(call.get(), 1));
      if (result == nullptr) {
        py::error_already_set error;
        wrong = error.what();
      }
      Py_XDECREF(result);
    }
    PyGILState_Release(state);
    TORCH_CHECK(wrong.empty(), wrong);
  };
  py::gil_scoped_release released;
  submit_on_current(device->index(), std::move(command));
}

const std::map<std::string, MemoryNumbers> kNumbers{{"exact", MemoryNumbers::Exact},
                                                    {"late", MemoryNumbers::Late},
                                                    {"negative", MemoryNumbers::Negative},
                                                    {"lost", MemoryNumbers::Lost}};

void configure(std::optional<uint64_t> seed, std::optional<bool> races,
               std::optional<size_t> memory, std::optional<double> timeout,
               std::optional<std::string> numbers) {
  Settings& now = settings();
  for (int device = 0; device < device_count(); ++device) wait_for_device(device);
  Locked guard(lock());
  if (numbers) {
    const auto found = kNumbers.find(*numbers);
    TORCH_CHECK(found != kNumbers.end(), "numbers=", *numbers,
                " must be exact, late, negative or lost");
    now.numbers = found->second;
  }
  if (seed) now.seed = *seed;
  if (memory) now.memory = *memory;
  if (timeout) now.timeout = *timeout;
  if (races && *races != now.races) {
    races::forget_all();
    races::found(true);
    now.races = *races;
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("device_count", &device_count);
  m.def("current_device", &current_device);
  m.def("set_device", &set_current_device);
  m.def("new_pool", &new_pool);
  m.def("stop", &stop);
  m.def("launch", &launch);
  m.def("races", &races::found, py::arg("clear") = false);
  m.def("configure", &configure, py::kw_only(), py::arg("seed") = py::none(),
        py::arg("races") = py::none(), py::arg("memory") = py::none(),
        py::arg("timeout") = py::none(), py::arg("numbers") = py::none(),
        py::call_guard<py::gil_scoped_release>());
  m.def("manual_seed", [](int device, uint64_t seed) {
    at::Generator generator = default_generator(device);
    std::lock_guard<std::mutex> guard(generator.mutex());
    generator.set_current_seed(seed);
  });
  m.def("settings", [] {
    const Settings& now = settings();
    py::dict out;
    out["seed"] = now.seed;
    out["races"] = now.races;
    out["memory"] = now.memory;
    out["timeout"] = now.timeout;
    for (const auto& [name, value] : kNumbers)
      if (value == now.numbers) out["numbers"] = name;
    return out;
  });
  m.def("segments", [] {
    py::list out;
    for (const auto& each : segments()) {
      py::dict entry;
      entry["device"] = each.device;
      entry["address"] = each.address;
      entry["total_size"] = each.size;
      entry["segment_pool_id"] = py::make_tuple(each.pool.first, each.pool.second);
      out.append(entry);
    }
    return out;
  });
  py::class_<Graph, std::shared_ptr<Graph>>(m, "Graph")
      .def(py::init<>())
      .def(
          "capture_begin",
          [](Graph& graph, std::optional<c10::MempoolId_t> pool, const std::string&) {
            graph.begin(pool.value_or(c10::MempoolId_t{0, 0}));
          },
          py::arg("pool") = py::none(), py::arg("capture_error_mode") = "thread_local",
          py::call_guard<py::gil_scoped_release>())
      .def("capture_end",
           [](Graph& graph) {
             torch::PyWarningHandler warnings;  // as Python's, which it needs the lock for
             py::gil_scoped_release release;
             graph.end();
           })
      .def("replay", &Graph::replay, py::call_guard<py::gil_scoped_release>())
      .def("reset", &Graph::reset, py::call_guard<py::gil_scoped_release>())
      .def("pool", &Graph::pool);
}

}  // namespace sim
