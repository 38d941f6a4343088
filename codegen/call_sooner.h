// Calls of sparsified modules that ask the last call without a line of Python: what ``_call_sooner``
// of install.py does, which has to stay the ``__call__`` of their class, for those who look there.
// So a class gets another function behind its calls. Python puts its own back where ``__call__`` of
// the class is set anew.
#pragma once
#include "read_tensors.h"

namespace {

struct Sooner {
  PyObject *call, *call_impl, *forward, *missed, *dynamo_callback;  // of install.py
  PyObject *engine_name, *last_call_name, *original_name, *compiled_name;
  PyObject *call_name, *call_impl_name, *forward_name;
  ternaryfunc in_python;  // what calls ``__call__``; the same in all classes

  bool know_names() {
    engine_name = PyUnicode_InternFromString("_engine");
    last_call_name = PyUnicode_InternFromString("last_call");
    original_name = PyUnicode_InternFromString("original");
    compiled_name = PyUnicode_InternFromString("_compiled_call_impl");
    call_name = PyUnicode_InternFromString("__call__");
    call_impl_name = PyUnicode_InternFromString("_call_impl");
    forward_name = PyUnicode_InternFromString("forward");
    return !PyErr_Occurred();
  }
} sooner;

bool has(PyTypeObject* type, PyObject* name, PyObject* value) {
  return Owned(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name)).get() == value;
}

// See is_called_plainly of last_call.py, and _call_sooner for the rest.
bool is_called_plainly(PyObject* module, PyObject* engine) {
  const Owned compiled(PyObject_GenericGetAttr(module, sooner.compiled_name));
  const Owned original(PyObject_GetAttr(engine, sooner.original_name));
  if (!original || compiled.get() != Py_None) return false;
  if (!has(Py_TYPE(module), sooner.forward_name, sooner.forward)) return false;
  PyTypeObject* const type = Py_TYPE(original.get());
  if (!has(type, sooner.call_name, sooner.call)) return false;
  if (!has(type, sooner.call_impl_name, sooner.call_impl)) return false;
  const Owned attributes(PyObject_GenericGetDict(original.get(), nullptr));
  if (!attributes || PyDict_Contains(attributes.get(), sooner.call_impl_name) != 0) return false;
  return Owned(PyObject_CallNoArgs(sooner.dynamo_callback)).get() == Py_None;
}

PyObject* call_module(PyObject* module, PyObject* args, PyObject* kwargs) {
  const Py_ssize_t count = PyTuple_GET_SIZE(args);
  const Owned with_module(PyTuple_New(count + 1));
  if (!with_module) return nullptr;
  PyTuple_SET_ITEM(with_module.get(), 0, Py_NewRef(module));
  for (Py_ssize_t i = 0; i < count; ++i)
    PyTuple_SET_ITEM(with_module.get(), i + 1, Py_NewRef(PyTuple_GET_ITEM(args, i)));
  return PyObject_Call(sooner.call, with_module.get(), kwargs);
}

PyObject* call_sooner(PyObject* module, PyObject* args, PyObject* kwargs) {
  const Owned engine(PyObject_GenericGetAttr(module, sooner.engine_name));
  const Owned last_call(engine ? PyObject_GetAttr(engine.get(), sooner.last_call_name) : nullptr);
  if (!last_call) return nullptr;
  if (last_call.get() == Py_None || !is_called_plainly(module, engine.get())) {
    return PyErr_Occurred() ? nullptr : sooner.in_python(module, args, kwargs);
  }
  const Owned by_name = kwargs != nullptr ? kept(kwargs) : Owned(PyDict_New());
  if (!by_name) return nullptr;
  PyObject* const given[] = {args, by_name.get()};
  Owned result(PyObject_Vectorcall(last_call.get(), given, 2, nullptr));
  return result.get() == sooner.missed ? call_module(module, args, kwargs) : result.release();
}

// call_sooner(class, call, call_impl, forward, missed, dynamo_callback); the last one says None if not.
PyObject* install_call_sooner(PyObject*, PyObject* arguments) {
  PyTypeObject* type;
  PyObject *call, *call_impl, *forward, *missed, *dynamo_callback;
  if (!PyArg_ParseTuple(arguments, "O!OOOOO", &PyType_Type, &type, &call, &call_impl, &forward, &missed,
                        &dynamo_callback)) {
    return nullptr;
  }
  if (type->tp_call == call_sooner) Py_RETURN_NONE;
  if (sooner.call == nullptr) {
    sooner.call = Py_NewRef(call), sooner.call_impl = Py_NewRef(call_impl);
    sooner.forward = Py_NewRef(forward);
    sooner.missed = Py_NewRef(missed), sooner.dynamo_callback = Py_NewRef(dynamo_callback);
    sooner.in_python = type->tp_call;
  }
  type->tp_call = call_sooner;
  Py_RETURN_NONE;
}

}  // namespace
