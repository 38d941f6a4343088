// An extension of Python that makes prepared calls of kernels: what Prepared of prepared_call.py
// does for a call that is like an earlier one, without the time of its lines and of ctypes. Further
// calls that are like earlier ones are in the headers.
#include "read_tensors.h"

#include <vector>

#include "call_sooner.h"
#include "original_call.h"

namespace {

// What is asked of torch, and names; they live as long as the process.
struct Known {
  PyObject *empty_like, *get_num_threads, *is_grad_enabled;
  PyObject *is_neg, *current, *layout, *seen, *question, *spared;
} known;

// Dtypes, devices, sizes and strides of tensors.
class Layouts : public Bytes {
 public:
  void add(const DLTensor& tensor) {
    put(tensor.dtype), put(tensor.device), put(tensor.ndim);
    const size_t bytes = tensor.ndim * sizeof(int64_t);
    put(tensor.shape, bytes), put(tensor.strides, bytes);
  }
};

PyObject* layouts_of(PyObject*, PyObject* tensors) {
  Layouts found;
  for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
    DLTensor tensor;
    if (!torch_tensors.read(PyList_GET_ITEM(tensors, i), &tensor)) Py_RETURN_NONE;
    found.add(tensor);
  }
  if (PyErr_Occurred()) return nullptr;
  if (!found.are_complete()) Py_RETURN_NONE;
  return found.object();
}

// Where an argument is: in which sequence of the call, and at which place there.
struct Place {
  Py_ssize_t sequence, index;

  PyObject* in(PyObject* const* sequences) const {  // borrowed; null if there is none
    PyObject* const items = sequences[sequence];
    if (!PyTuple_Check(items) && !PyList_Check(items)) return nullptr;
    return index < PySequence_Fast_GET_SIZE(items) ? PySequence_Fast_GET_ITEM(items, index) : nullptr;
  }
};

// A weight, and what its memory held: so many bytes in each row, at equal distances.
struct Weight {
  Owned contents;
  unsigned long long content;
  long long rows, row_bytes, stride_bytes;
  void* address;
};

struct Packing {
  Owned weight, layout;
  void* address;
};

struct Output {
  Owned example;  // itself the output, where that is spare
  bool is_spare;
};

enum Outcome : int { kDone = 0, kNoMemory = 1, kWritten = 2 };  // of prepared_call.h
constexpr Py_ssize_t kQuestionBytes = 24;                       // of write_watch.h

class Repeater {
 public:
  // Functions of the support library.
  int (*run)(const void* prepared, void* const* pointers, const void* questions, int64_t count);
  uint64_t (*hash)(const void* rows, int64_t count, int64_t row_bytes, int64_t stride_bytes, int threads);
  const void* prepared;
  long threads, batch;
  Py_ssize_t sequences = 0;
  std::vector<Place> places;  // of operands, then of weights
  std::vector<Weight> weights;
  Layouts layouts;
  std::vector<Packing> packings;
  Owned asked;    // [a question for each weight, empty for those to be read; all of them as one]
  Owned keeping;  // what `prepared` points to
  std::vector<Output> outputs;
  std::vector<Py_ssize_t> returned;

  // A new reference; null without an error if this is not such a call.
  PyObject* call(bool frozen, PyObject* const* sequences) const {
    const size_t operands = places.size() - weights.size();
    std::vector<void*> pointers;
    pointers.reserve(places.size() + packings.size() + outputs.size());
    if (!is_alike(sequences, pointers)) return nullptr;
    pointers.resize(operands);
    std::vector<Owned> held;  // until the call ends
    for (const Packing& packing : packings) {
      Owned current(PyObject_GetAttr(packing.weight.get(), known.current));
      if (!current || current.get() == Py_None) return nullptr;
      if (!has(current.get(), known.layout, packing.layout.get())) return nullptr;
      held.push_back(std::move(current));
      pointers.push_back(packing.address);
    }
    Owned questions = frozen ? Owned() : questions_now(held);
    if (!frozen && !questions) return nullptr;
    PyObject* const each = frozen ? nullptr : held.back().get();
    Owned results(PyTuple_New(returned.size()));
    std::vector<Owned> made;
    for (const Output& output : outputs) {
      made.push_back(output.is_spare ? kept(output.example.get())
                                     : Owned(PyObject_CallOneArg(known.empty_like, output.example.get())));
      DLTensor tensor;
      if (!made.back() || !torch_tensors.read(made.back().get(), &tensor)) return nullptr;
      pointers.push_back(tensor.data);
    }
    for (size_t i = 0; i < returned.size(); ++i)
      PyTuple_SET_ITEM(results.get(), i, Py_NewRef(made[returned[i]].get()));
    return launch(pointers, each, questions.get()) ? results.release() : nullptr;
  }

 private:
  static bool has(PyObject* object, PyObject* name, PyObject* value) {
    return Owned(PyObject_GetAttr(object, name)).get() == value;
  }

  static long ask(PyObject* function) {
    const Owned answer(PyObject_CallNoArgs(function));
    return answer ? PyLong_AsLong(answer.get()) : -1;
  }

  // Whether all tensors lie as they did, with weights in the same places.
  bool is_alike(PyObject* const* sequences, std::vector<void*>& pointers) const {
    if (ask(known.get_num_threads) != threads) return false;
    const bool may_need_grad = ask(known.is_grad_enabled) != 0;
    Layouts now;
    for (const Place& place : places) {
      PyObject* const object = place.in(sequences);
      DLTensor tensor;
      if (object == nullptr || !torch_tensors.read(object, &tensor)) return false;
      if (tensor.device.device_type != kDLCPU) return false;
      if (Owned(PyObject_CallMethodNoArgs(object, known.is_neg)).get() != Py_False) return false;
      if (may_need_grad && !has(object, torch_tensors.requires_grad, Py_False)) return false;
      now.add(tensor);
      pointers.push_back(static_cast<char*>(tensor.data) + tensor.byte_offset);
    }
    const size_t operands = places.size() - weights.size();
    for (size_t i = 0; i < weights.size(); ++i)
      if (pointers[operands + i] != weights[i].address) return false;
    return now == layouts;
  }

  // What is to be asked while the kernel runs; null where that is not known.
  Owned questions_now(std::vector<Owned>& held) const {
    PyObject* const each = PyList_GetItem(asked.get(), 0);
    if (each == nullptr || PyTuple_Size(each) != Py_ssize_t(weights.size())) return Owned();
    for (size_t i = 0; i < weights.size(); ++i) {
      PyObject* const question = PyTuple_GET_ITEM(each, i);
      if (PyBytes_GET_SIZE(question) == 0) continue;
      PyObject* const contents = weights[i].contents.get();
      Owned seen(PyObject_GetAttr(contents, known.seen));
      if (!seen || seen.get() == Py_None || !has(seen.get(), known.question, question)) return Owned();
      held.push_back(std::move(seen));
      const Owned spared(PyObject_GetAttr(contents, known.spared));
      const Owned more(spared ? PyLong_FromLong(PyLong_AsLong(spared.get()) + 1) : nullptr);
      if (!more || PyObject_SetAttr(contents, known.spared, more.get()) != 0) return Owned();
    }
    held.push_back(kept(each));
    return kept(PyList_GET_ITEM(asked.get(), 1));
  }

  // Whether the weights that have no question hold what they did.
  bool hold_the_same(PyObject* each) const {
    for (size_t i = 0; i < weights.size(); ++i) {
      if (PyBytes_GET_SIZE(PyTuple_GET_ITEM(each, i)) != 0) continue;
      const Weight& weight = weights[i];
      if (hash(weight.address, weight.rows, weight.row_bytes, weight.stride_bytes, int(threads)) !=
          weight.content) {
        return false;
      }
    }
    return true;
  }

  // Whether outputs hold what they should. Raises MemoryError.
  bool launch(const std::vector<void*>& pointers, PyObject* each, PyObject* questions) const {
    const char* const words = questions != nullptr ? PyBytes_AS_STRING(questions) : "";
    const Py_ssize_t count = questions != nullptr ? PyBytes_GET_SIZE(questions) / kQuestionBytes : 0;
    int outcome;
    Py_BEGIN_ALLOW_THREADS;
    const bool is_known = each == nullptr || hold_the_same(each);
    outcome = is_known ? run(prepared, pointers.data(), words, count) : kWritten;
    Py_END_ALLOW_THREADS;
    if (outcome == kNoMemory) PyErr_Format(PyExc_MemoryError, "no memory for %ld batch rows", batch);
    return outcome == kDone;
  }
};

struct RepeaterObject {
  PyObject_HEAD;
  vectorcallfunc call;
  Repeater* repeater;
};

// repeater(frozen, *sequences): the results, or None where the call is not like the earlier one.
PyObject* call_repeater(PyObject* self, PyObject* const* arguments, size_t count, PyObject*) {
  const Repeater& repeater = *reinterpret_cast<RepeaterObject*>(self)->repeater;
  if (PyVectorcall_NARGS(count) != repeater.sequences + 1) Py_RETURN_NONE;
  PyObject* const results = repeater.call(arguments[0] == Py_True, arguments + 1);
  if (results != nullptr) return results;
  if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_MemoryError)) return nullptr;
  PyErr_Clear();  // the long way says what is wrong
  Py_RETURN_NONE;
}

void end_repeater(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<RepeaterObject*>(self)->repeater;
  type->tp_free(self);
  Py_DECREF(type);
}

PyTypeObject* repeater_type;

// See Prepared.repeater of prepared_call.py, which calls it.
PyObject* make_repeater(PyObject*, PyObject* arguments) {
  auto made = std::make_unique<Repeater>();
  unsigned long long run, hash, prepared;
  PyObject *keeping, *places, *tensors, *packings, *weights, *asked, *outputs, *returned;
  PyTypeObject* const list = &PyList_Type;
  if (!PyArg_ParseTuple(arguments, "KKKOllO!O!O!O!O!O!O!", &run, &hash, &prepared, &keeping,
                        &made->threads, &made->batch, list, &places, list, &tensors, list, &packings,
                        list, &weights, list, &asked, list, &outputs, list, &returned)) {
    return nullptr;
  }
  made->run = reinterpret_cast<decltype(made->run)>(run);
  made->hash = reinterpret_cast<decltype(made->hash)>(hash);
  made->prepared = reinterpret_cast<const void*>(prepared);
  made->keeping = kept(keeping), made->asked = kept(asked);
  const Py_ssize_t operands = PyList_GET_SIZE(tensors) - PyList_GET_SIZE(weights);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
    DLTensor tensor;
    Place place;
    if (!torch_tensors.read(PyList_GET_ITEM(tensors, i), &tensor)) Py_RETURN_NONE;
    if (!PyArg_ParseTuple(PyList_GetItem(places, i), "nn", &place.sequence, &place.index)) return nullptr;
    made->layouts.add(tensor);
    made->places.push_back(place);
    if (i >= operands) {
      Weight weight{};
      PyObject* contents;
      if (!PyArg_ParseTuple(PyList_GET_ITEM(weights, i - operands), "OKLLL", &contents, &weight.content,
                            &weight.rows, &weight.row_bytes, &weight.stride_bytes)) {
        return nullptr;
      }
      weight.contents = kept(contents);
      weight.address = static_cast<char*>(tensor.data) + tensor.byte_offset;
      made->weights.push_back(std::move(weight));
    }
    if (place.sequence >= made->sequences) made->sequences = place.sequence + 1;
  }
  if (!made->layouts.are_complete()) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(packings); ++i) {
    PyObject *weight, *layout;
    unsigned long long address;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(packings, i), "OOK", &weight, &layout, &address)) return nullptr;
    made->packings.push_back({kept(weight), kept(layout), reinterpret_cast<void*>(address)});
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(outputs); ++i) {
    PyObject* example;
    int is_spare;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(outputs, i), "Op", &example, &is_spare)) return nullptr;
    made->outputs.push_back({kept(example), is_spare != 0});
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(returned); ++i)
    made->returned.push_back(PyLong_AsSsize_t(PyList_GET_ITEM(returned, i)));
  if (PyErr_Occurred()) return nullptr;
  auto* const object = reinterpret_cast<RepeaterObject*>(repeater_type->tp_alloc(repeater_type, 0));
  if (object == nullptr) return nullptr;
  object->call = call_repeater;
  object->repeater = made.release();
  return reinterpret_cast<PyObject*>(object);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(RepeaterObject, call), READONLY, nullptr},
    {},
};
PyType_Slot slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(end_repeater)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, members},
    {},
};
PyType_Spec repeater_spec = {
    "native_call.Repeater", sizeof(RepeaterObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

PyMethodDef functions[] = {
    {"layouts_of", layouts_of, METH_O, "What tells layouts of tensors from others; None if nothing does."},
    {"repeater", make_repeater, METH_VARARGS, "See Prepared.repeater of prepared_call.py."},
    {"original_call", make_original, METH_VARARGS, "See last_original of last_call.py."},
    {"call_sooner", install_call_sooner, METH_VARARGS, "See hasten of install.py."},
    {},
};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "native_call", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

bool know_torch() {
  const Owned torch(PyImport_ImportModule("torch"));
  if (!torch || !torch_tensors.know()) return false;
  known.empty_like = PyObject_GetAttrString(torch.get(), "empty_like");
  known.get_num_threads = PyObject_GetAttrString(torch.get(), "get_num_threads");
  known.is_grad_enabled = PyObject_GetAttrString(torch.get(), "is_grad_enabled");
  const char* const names[] = {"is_neg", "current", "layout", "seen", "question", "spared"};
  PyObject** const places[] = {&known.is_neg, &known.current,  &known.layout,
                               &known.seen,   &known.question, &known.spared};
  for (size_t i = 0; i < std::size(names); ++i) *places[i] = PyUnicode_InternFromString(names[i]);
  return !PyErr_Occurred();
}

}  // namespace

PyMODINIT_FUNC PyInit_native_call() {
  repeater_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&repeater_spec));
  original_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&original_spec));
  if (repeater_type == nullptr || original_type == nullptr || !know_torch()) return nullptr;
  if (!OriginalCall::know_names() || !sooner.know_names()) return nullptr;
  return PyModule_Create(&module);
}
