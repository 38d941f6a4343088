// Tensors of torch, read by extensions of Python.
//
// They are read through DLPack, the one interface of torch's that C can use and that is promised to
// stay: its header comes with torch, and is compiled in no time.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <cstdint>
#include <cstring>
#include <memory>

#include "dlpack.h"

namespace {

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

inline Owned kept(PyObject* object) { return Owned(Py_NewRef(object)); }

// What torch calls tensors; it lives as long as the process.
struct Tensors {
  PyObject *tensor, *parameter, *requires_grad;
  const DLPackExchangeAPI* dlpack;

  bool know() {
    const Owned torch(PyImport_ImportModule("torch"));
    const Owned modules(torch ? PyObject_GetAttrString(torch.get(), "nn") : nullptr);
    if (!modules) return false;
    tensor = PyObject_GetAttrString(torch.get(), "Tensor");
    parameter = PyObject_GetAttrString(modules.get(), "Parameter");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    if (PyErr_Occurred()) return false;
    const Owned capsule(PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__"));
    if (!capsule) return false;
    dlpack = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
    if (dlpack == nullptr) return false;
    if (dlpack->header.version.major == DLPACK_MAJOR_VERSION) return true;
    PyErr_SetString(PyExc_ImportError, "another version of DLPack");
    return false;
  }

  // Not a class of its own, which may do anything.
  bool are_of(PyObject* object) const {
    const PyTypeObject* const type = Py_TYPE(object);
    return type == (PyTypeObject*)tensor || type == (PyTypeObject*)parameter;
  }

  // False where memory cannot be read as it is: for a sparse tensor, or what is no tensor.
  bool read(PyObject* object, DLTensor* found) const {
    if (!are_of(object)) return false;
    if (dlpack->dltensor_from_py_object_no_sync(object, found) == 0) return true;
    PyErr_Clear();
    return false;
  }
} torch_tensors;

// What is written one after the other, to be compared.
class Bytes {
 public:
  bool operator==(const Bytes& other) const {
    return size_ == other.size_ && std::memcmp(bytes_, other.bytes_, size_) == 0;
  }
  bool are_complete() const { return size_ <= kMost; }
  PyObject* object() const { return PyBytes_FromStringAndSize(bytes_, size_); }

  template <typename T>
  void put(const T& value) {
    put(&value, sizeof value);
  }
  void put(const void* from, size_t bytes) {
    if (size_ + bytes <= kMost) std::memcpy(bytes_ + size_, from, bytes);
    size_ = size_ + bytes <= kMost ? size_ + bytes : kMost + 1;
  }

 private:
  static constexpr size_t kMost = 2000;  // some twenty tensors; larger calls take their time anyway

  size_t size_ = 0;
  char bytes_[kMost];
};

}  // namespace
