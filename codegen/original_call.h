// Calls that run the original model, made again: what LastOriginal of last_call.py does, without the
// lines of Python, which nothing has touched since the last step of training and which are read from
// memory then.
//
// The original is never wrong. What is asked is whether another call may have a kernel, and whether
// there are hooks to be called.
#pragma once
#include "read_tensors.h"

#include <utility>
#include <vector>

namespace {

// What tells the arguments of a call from others: see kinds of call_key.py.
class Kinds {
 public:
  // Whether it is a call that can be told from others here.
  bool add(PyObject* args, PyObject* kwargs) {
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &name, &value);) {
      found_.put(name);
      if (!add(value)) return false;
    }
    return add(args) && found_.are_complete();
  }
  bool operator==(const Kinds& other) const { return found_ == other.found_; }

 private:
  bool add(PyObject* value) {
    found_.put(Py_TYPE(value));
    if (torch_tensors.are_of(value)) return add_tensor(value);
    if (PyTuple_Check(value) || PyList_CheckExact(value)) return add_elements(value);
    return value == Py_None || PyBool_Check(value) || PyLong_CheckExact(value) || PyFloat_CheckExact(value) ||
           PyUnicode_CheckExact(value);
  }

  bool add_tensor(PyObject* value) {
    DLTensor tensor;
    if (!torch_tensors.read(value, &tensor)) return false;
    const Owned requires_grad(PyObject_GetAttr(value, torch_tensors.requires_grad));
    found_.put(requires_grad.get()), found_.put(tensor.dtype), found_.put(tensor.device);
    found_.put(tensor.ndim), found_.put(tensor.shape, tensor.ndim * sizeof(int64_t));
    return requires_grad != nullptr;
  }

  bool add_elements(PyObject* sequence) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    found_.put(count);
    for (Py_ssize_t i = 0; i < count; ++i)  // a list may contain itself
      if (!found_.are_complete() || !add(PySequence_Fast_GET_ITEM(sequence, i))) return false;
    return true;
  }

  Bytes found_;
};

struct Question {
  Owned function, answer;

  bool is_answered_so() const { return Owned(PyObject_CallNoArgs(function.get())) == answer; }
};

// A weight, held weakly, and whether it requires grad: see Known of originals.py.
struct Required {
  Owned weight, answer;

  bool is_answered_so() const {
    const Owned found(PyObject_CallNoArgs(weight.get()));
    if (!found || found.get() == Py_None) return false;
    return Owned(PyObject_GetAttr(found.get(), torch_tensors.requires_grad)) == answer;
  }
};

class OriginalCall {
 public:
  Owned model, training, missed;
  std::vector<Required> weights;
  std::vector<Question> questions;
  std::vector<Owned> own_hooks, global_hooks;  // names of tables; tables
  Kinds kinds;

  // Whether its like were served; raises what a question raises.
  bool serves(PyObject* args, PyObject* kwargs) const {
    for (const Question& question : questions)
      if (!question.is_answered_so()) return false;
    for (const Required& weight : weights)
      if (!weight.is_answered_so()) return false;
    if (!is_unobserved()) return false;
    Kinds now;
    return now.add(args, kwargs) && now == kinds;
  }

  PyObject* run(PyObject* args, PyObject* kwargs) const {
    const Owned forward(PyObject_GetAttr(model.get(), names.forward));
    return forward ? PyObject_Call(forward.get(), args, kwargs) : nullptr;
  }

  static bool know_names() {
    names.training = PyUnicode_InternFromString("training");
    names.forward = PyUnicode_InternFromString("forward");
    return !PyErr_Occurred();
  }

 private:
  static inline struct {
    PyObject *training, *forward;
  } names;

  // Whether the model is in the mode of training that it was in, and there are no hooks.
  bool is_unobserved() const {
    for (const Owned& table : global_hooks)
      if (PyDict_GET_SIZE(table.get()) != 0) return false;
    const Owned attributes(PyObject_GenericGetDict(model.get(), nullptr));
    if (!attributes) return false;
    for (const Owned& name : own_hooks) {
      PyObject* const table = PyDict_GetItemWithError(attributes.get(), name.get());
      if (table == nullptr || !PyDict_Check(table) || PyDict_GET_SIZE(table) != 0) return false;
    }
    return PyDict_GetItemWithError(attributes.get(), names.training) == training.get();
  }
};

struct OriginalObject {
  PyObject_HEAD;
  vectorcallfunc vectorcall;
  Py_ssize_t calls, served;
  OriginalCall* call;
};

// original_call(args, kwargs): the result, or what stands for none.
PyObject* call_original(PyObject* self, PyObject* const* arguments, size_t count, PyObject* by_name) {
  auto* const object = reinterpret_cast<OriginalObject*>(self);
  const OriginalCall& call = *object->call;
  const bool are_two = PyVectorcall_NARGS(count) == 2 && by_name == nullptr;
  if (!are_two || !PyTuple_Check(arguments[0]) || !PyDict_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "the arguments of a call are a tuple and a dict");
    return nullptr;
  }
  PyObject *const args = arguments[0], *const kwargs = arguments[1];
  if (object->served < object->calls && call.serves(args, kwargs)) {
    object->served += 1;
    return call.run(args, kwargs);
  }
  return PyErr_Occurred() ? nullptr : Py_NewRef(call.missed.get());
}

int visit_original(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const OriginalCall* const call = reinterpret_cast<OriginalObject*>(self)->call;
  if (call != nullptr) Py_VISIT(call->model.get());
  return 0;
}

int clear_original(PyObject* self) {
  delete std::exchange(reinterpret_cast<OriginalObject*>(self)->call, nullptr);
  return 0;
}

void end_original(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear_original(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyTypeObject* original_type;

// See last_original of last_call.py, which calls it; None where Python has to do it.
PyObject* make_original(PyObject*, PyObject* arguments) {
  PyObject *model, *args, *kwargs, *missed, *questions, *own_hooks, *global_hooks, *weights, *required;
  Py_ssize_t calls;
  PyTypeObject* const tuple = &PyTuple_Type;
  if (!PyArg_ParseTuple(arguments, "OO!O!nOO!O!O!O!O!", &model, tuple, &args, &PyDict_Type, &kwargs, &calls,
                        &missed, tuple, &questions, tuple, &own_hooks, tuple, &global_hooks, tuple, &weights,
                        tuple, &required)) {
    return nullptr;
  }
  auto made = std::make_unique<OriginalCall>();
  made->model = kept(model), made->missed = kept(missed);
  made->training = Owned(PyObject_GetAttrString(model, "training"));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(questions); ++i) {
    PyObject *function, *answer;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(questions, i), "OO", &function, &answer)) return nullptr;
    made->questions.push_back({kept(function), kept(answer)});
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(own_hooks); ++i)
    made->own_hooks.push_back(kept(PyTuple_GET_ITEM(own_hooks, i)));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(global_hooks); ++i)
    made->global_hooks.push_back(kept(PyTuple_GET_ITEM(global_hooks, i)));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(weights) && i < PyTuple_GET_SIZE(required); ++i)
    made->weights.push_back({kept(PyTuple_GET_ITEM(weights, i)), kept(PyTuple_GET_ITEM(required, i))});
  const bool is_known = made->kinds.add(args, kwargs) && made->serves(args, kwargs);
  if (PyErr_Occurred()) return nullptr;
  if (!is_known) Py_RETURN_NONE;
  auto* const object = reinterpret_cast<OriginalObject*>(original_type->tp_alloc(original_type, 0));
  if (object == nullptr) return nullptr;
  object->vectorcall = call_original;
  object->calls = calls;
  object->call = made.release();
  return reinterpret_cast<PyObject*>(object);
}

PyMemberDef original_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(OriginalObject, vectorcall), READONLY, nullptr},
    {"served", T_PYSSIZET, offsetof(OriginalObject, served), READONLY, nullptr},
    {},
};
PyType_Slot original_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(end_original)},
    {Py_tp_traverse, reinterpret_cast<void*>(visit_original)},
    {Py_tp_clear, reinterpret_cast<void*>(clear_original)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, original_members},
    {},
};
PyType_Spec original_spec = {
    "native_call.OriginalCall", sizeof(OriginalObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    original_slots};

}  // namespace
