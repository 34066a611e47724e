// The extension module: Python arguments to kernel arguments, without torch's headers. Tensors are read through the
// DLPack exchange interface that torch.Tensor publishes.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include "attend.h"
#include "storage.h"

namespace tqc {

Pool pool;
bool use_int8 = true;
float scale_factors[256];
thread_local Scratch scratch;

namespace {

DLPackExchangeAPI* exchange;
PyObject *formats, *on_unknown_spec, *empty_strided, *keyword_dtype, *name_contiguous;
PyObject* torch_dtypes[3];

struct Failure {};  // a Python error is set

[[noreturn]] void fail(PyObject* type, const char* message) {
  PyErr_SetString(type, message);
  throw Failure{};
}

struct Array {
  DLTensor t;
  PyObject* owned = nullptr;
  ~Array() { Py_XDECREF(owned); }
  Array() = default;
  Array(const Array&) = delete;

  void get(PyObject* o, int ndim, const char* name) {
    if (exchange->dltensor_from_py_object_no_sync(o, &t) != 0) throw Failure{};
    if (t.device.device_type != kDLCPU) fail(PyExc_ValueError, "the cpu provider takes CPU tensors");
    if (ndim >= 0 && t.ndim != ndim) {
      PyErr_Format(PyExc_ValueError, "%s must have %d dimensions, got %d", name, ndim, int(t.ndim));
      throw Failure{};
    }
  }
  // As `get`, and the last axis contiguous, by a copy if need be.
  void get_rows(PyObject* o, const char* name) {
    get(o, 4, name);
    if (t.strides[3] == 1) return;
    owned = PyObject_CallMethodNoArgs(o, name_contiguous);
    if (!owned) throw Failure{};
    get(owned, 4, name);
  }
  char* data() const { return (char*)t.data + t.byte_offset; }
  int64_t size(int i) const { return t.shape[i]; }
  int64_t stride(int i) const { return t.strides[i] * (t.dtype.bits / 8); }
  bool is(int code, int bits) const { return t.dtype.code == code && t.dtype.bits == bits; }
  Dtype dtype(const char* name) const {
    if (is(kDLFloat, 32)) return F32;
    if (is(kDLBfloat, 16)) return BF16;
    if (is(kDLFloat, 16)) return F16;
    PyErr_Format(PyExc_TypeError, "%s must be float32, bfloat16 or float16", name);
    throw Failure{};
  }
};

const Format* format_of(PyObject* spec) {
  PyObject* found = PyDict_GetItemWithError(formats, spec);
  if (found) return (const Format*)PyLong_AsVoidPtr(found);
  if (PyErr_Occurred()) throw Failure{};
  PyObject* made = PyObject_CallOneArg(on_unknown_spec, spec);
  if (!made) throw Failure{};
  auto* f = (const Format*)PyLong_AsVoidPtr(made);
  int status = PyDict_SetItem(formats, spec, made);
  Py_DECREF(made);
  if (status) throw Failure{};
  return f;
}

Store store_of(PyObject* pages_object, PyObject* dense_object, PyObject* state_object, PyObject* spec, Array& dense) {
  Array pages, state;
  const Format* f = format_of(spec);
  pages.get(pages_object, 4, "pages");
  dense.get(dense_object, 4, "dense");
  state.get(state_object, 1, "state");
  if (!pages.is(kDLUInt, 8) || pages.size(3) != f->page_bytes || (pages.t.strides[3] != 1 && pages.size(2)))
    fail(PyExc_ValueError, "pages do not fit the spec");
  if (dense.size(3) != f->dim || dense.size(2) != 1 + f->sinks + f->window || dense.t.strides[3] != 1)
    fail(PyExc_ValueError, "dense does not fit the spec");
  if (pages.size(0) != dense.size(0) || pages.size(1) != dense.size(1))
    fail(PyExc_ValueError, "pages and dense differ in batch or heads");
  if (!state.is(kDLInt, 64) || state.size(0) != 2 || state.t.strides[0] != 1)
    fail(PyExc_ValueError, "state must be int64 [2]");
  return {f,
          (uint8_t*)pages.data(), pages.stride(0), pages.stride(1), pages.stride(2), pages.size(2),
          dense.data(), dense.stride(0), dense.stride(1), dense.stride(2),
          dense.dtype("dense"), (int64_t*)state.data()};
}

// The first element of `start`, or -1 for None.
int64_t start_of(PyObject* o) {
  if (o == Py_None) return -1;
  Array start;
  start.get(o, -1, "start");
  if (!start.is(kDLInt, 64)) fail(PyExc_TypeError, "start must be int64");
  int64_t first = *(int64_t*)start.data();
  if (first < 0) fail(PyExc_ValueError, "start must not be negative");
  return first;
}

PyObject* allocate(int ndim, const int64_t* sizes, const int64_t* strides, Dtype dtype) {
  PyObject *size = PyTuple_New(ndim), *stride = PyTuple_New(ndim);
  for (int i = 0; i < ndim; ++i) {
    PyTuple_SET_ITEM(size, i, PyLong_FromLongLong(sizes[i]));
    PyTuple_SET_ITEM(stride, i, PyLong_FromLongLong(strides[i]));
  }
  PyObject* args[] = {size, stride, torch_dtypes[dtype]};
  PyObject* out = PyObject_Vectorcall(empty_strided, args, 2, keyword_dtype);
  Py_DECREF(size);
  Py_DECREF(stride);
  if (!out) throw Failure{};
  return out;
}

void expect(Py_ssize_t got, Py_ssize_t wanted) {
  if (got == wanted) return;
  PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, got);
  throw Failure{};
}

void append_op(PyObject* const* args) {
  Array dense, news;
  AppendArgs a;
  a.store = store_of(args[0], args[1], args[2], args[5], dense);
  news.get_rows(args[3], "new");
  a.batch = dense.size(0);
  a.heads = dense.size(1);
  a.count = news.size(2);
  if (news.size(0) != a.batch || news.size(1) != a.heads || news.size(3) != a.store.f->dim)
    fail(PyExc_ValueError, "new does not fit the stored shape");
  if (news.dtype("new") != a.store.dtype) fail(PyExc_TypeError, "new and dense differ in dtype");
  a.news = {news.data(), news.stride(0), news.stride(1), news.stride(2), a.store.dtype};
  a.start = start_of(args[4]);
  if (pages_needed(a) > a.store.page_count) fail(PyExc_ValueError, "pages are full");
  if (a.count * a.batch * a.heads < 512) return append(a);
  Py_BEGIN_ALLOW_THREADS append(a);
  Py_END_ALLOW_THREADS
}

PyObject* read_op(PyObject* const* args) {
  Array dense;
  Store store = store_of(args[0], args[1], args[2], args[4], dense);
  int64_t length = PyLong_AsLongLong(args[3]);
  if (length < 0) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "length must not be negative");
    throw Failure{};
  }
  const int64_t batch = dense.size(0), heads = dense.size(1), dim = store.f->dim;
  const int64_t sizes[] = {batch, heads, length, dim}, strides[] = {heads * length * dim, length * dim, dim, 1};
  PyObject* result = allocate(4, sizes, strides, store.dtype);
  Array out;
  out.get(result, 4, "out");
  Py_BEGIN_ALLOW_THREADS read(store, out.data(), batch, heads, length);
  Py_END_ALLOW_THREADS
  return result;
}

Mask mask_of(PyObject* o, Array& mask, const AttendArgs& a, int64_t* columns) {
  Mask m;
  *columns = 0;
  if (o == Py_None) return m;
  mask.get(o, -1, "attn_mask");
  m.dtype = mask.is(kDLBool, 8) ? BOOL : mask.dtype("attn_mask, if not bool,");
  m.data = mask.data();
  const int64_t full[] = {a.batch, a.heads * a.group, a.rows, a.columns};
  int64_t* to[] = {&m.batch, &m.head, &m.row, &m.column};
  const int ndim = mask.t.ndim;
  if (ndim > 4) fail(PyExc_ValueError, "attn_mask has more than 4 dimensions");
  for (int i = 0; i < ndim; ++i) {
    const int axis = 4 - ndim + i;
    if (mask.size(i) == 1) continue;
    if (axis == 3 ? mask.size(i) < full[3] : mask.size(i) != full[axis])
      fail(PyExc_ValueError, "attn_mask does not broadcast to [batch, heads, rows, columns]");
    *to[axis] = mask.stride(i);
  }
  if (ndim) *columns = mask.size(ndim - 1);
  return m;
}

void view_of(View& view, const Store& store, int64_t length, const Array& news, bool fresh) {
  view.store = store;
  view.length = length;
  view.stored = std::min(store.state[0], length);
  view.packed = store.state[1];
  view.fresh = 0;
  if (!fresh) return;
  view.news = {news.data(), news.stride(0), news.stride(1), news.stride(2), news.dtype("key and value")};
  view.fresh = news.size(2);
}

PyObject* attend_op(PyObject* const* args) {
  Array query, k_dense, v_dense, key, value, mask, sinks;
  AttendArgs a;
  Store k = store_of(args[1], args[2], args[3], args[15], k_dense);
  Store v = store_of(args[4], args[5], args[6], args[16], v_dense);
  query.get_rows(args[0], "query");
  a.batch = k_dense.size(0);
  a.heads = k_dense.size(1);
  const int64_t query_heads = query.size(1);
  a.group = a.heads ? query_heads / a.heads : 1;
  a.rows = query.size(2);
  if (query.size(0) != a.batch || a.group * a.heads != query_heads || query.size(3) != k.f->dim)
    fail(PyExc_ValueError, "query does not fit the stored keys");
  if (v_dense.size(0) != a.batch || v_dense.size(1) != a.heads)
    fail(PyExc_ValueError, "keys and values differ in batch or heads");
  const bool fresh = args[7] != Py_None;
  if (fresh != (args[8] != Py_None)) fail(PyExc_ValueError, "key and value must both be given or both be None");
  if (fresh) {
    key.get_rows(args[7], "key");
    value.get_rows(args[8], "value");
    if (key.size(0) != a.batch || key.size(1) != a.heads || key.size(3) != k.f->dim || value.size(0) != a.batch ||
        value.size(1) != a.heads || value.size(3) != v.f->dim || key.size(2) != value.size(2))
      fail(PyExc_ValueError, "key and value do not fit the stored ones");
  }
  const int64_t start = start_of(args[11]);
  const int64_t length = start >= 0 ? start : k.state[0];
  if (std::min(k.state[0], length) != (start >= 0 ? std::min(v.state[0], length) : v.state[0])) {
    PyErr_Format(PyExc_ValueError, "k_state and v_state must agree: %lld keys are stored and %lld values",
                 (long long)k.state[0], (long long)v.state[0]);
    throw Failure{};
  }
  view_of(a.k, k, length, key, fresh);
  view_of(a.v, v, length, value, fresh);
  a.columns = length + a.k.fresh;
  int64_t mask_columns;
  a.mask = mask_of(args[9], mask, a, &mask_columns);
  a.columns = std::max(a.columns, mask_columns);
  a.scale = float(PyFloat_AsDouble(args[12]));
  a.softcap = float(PyFloat_AsDouble(args[13]));
  a.causal = PyObject_IsTrue(args[14]) == 1;
  if (PyErr_Occurred()) throw Failure{};

  float logits[1024];
  a.sinks = nullptr;
  if (args[10] != Py_None) {
    sinks.get(args[10], 1, "sinks");
    if (sinks.size(0) != query_heads || query_heads > 1024) fail(PyExc_ValueError, "sinks must be [query heads]");
    for (int64_t i = 0; i < query_heads; ++i)
      logits[i] = scalar_to_float(sinks.data() + i * sinks.stride(0), sinks.dtype("sinks"));
    a.sinks = logits;
  }

  // Laid out so that out.transpose(1, 2), which models ask for next, is contiguous.
  const int64_t dim = v.f->dim, sizes[] = {a.batch, query_heads, a.rows, dim};
  const int64_t strides[] = {a.rows * query_heads * dim, dim, query_heads * dim, 1};
  const int64_t lse_strides[] = {query_heads * a.rows, a.rows, 1};
  const Dtype dtype = query.dtype("query");
  PyObject* result = PyTuple_New(2);
  Array out, lse;
  try {
    PyTuple_SET_ITEM(result, 0, allocate(4, sizes, strides, dtype));
    PyTuple_SET_ITEM(result, 1, allocate(3, sizes, lse_strides, F32));
    out.get(PyTuple_GET_ITEM(result, 0), 4, "out");
    lse.get(PyTuple_GET_ITEM(result, 1), 3, "lse");
  } catch (Failure&) {
    Py_DECREF(result);
    throw;
  }
  a.query = {query.data(), query.stride(0), query.stride(1), query.stride(2), dtype};
  const int bytes = dtype_bytes(dtype);
  a.out = {out.data(), strides[0] * bytes, strides[1] * bytes, strides[2] * bytes, dtype};
  a.lse = (float*)lse.data();
  if (a.batch * a.heads * a.rows == 0) return result;
  Py_BEGIN_ALLOW_THREADS attend(a);
  Py_END_ALLOW_THREADS
  return result;
}

PyObject* py_append(PyObject*, PyObject* const* args, Py_ssize_t n) try {
  expect(n, 6);
  append_op(args);
  Py_RETURN_NONE;
} catch (Failure&) {
  return nullptr;
}

PyObject* py_read(PyObject*, PyObject* const* args, Py_ssize_t n) try {
  expect(n, 5);
  return read_op(args);
} catch (Failure&) {
  return nullptr;
}

PyObject* py_attend(PyObject*, PyObject* const* args, Py_ssize_t n) try {
  expect(n, 17);
  return attend_op(args);
} catch (Failure&) {
  return nullptr;
}

// make_format(dim, bits, centred, sinks, window, page_bytes, centre_offset, planes, levels, boundaries, rotation,
// is_hadamard, score_variance, folded) -> address; levels, boundaries and rotation are addresses of float32 arrays.
PyObject* py_make_format(PyObject*, PyObject* args) {
  FormatArguments a{};
  PyObject* planes;
  unsigned long long levels, boundaries, rotation;
  int hadamard;
  if (!PyArg_ParseTuple(args, "iiiiiiiO!KKKifi", &a.dim, &a.bits, &a.centred, &a.sinks, &a.window, &a.page_bytes,
                        &a.centre_offset, &PyTuple_Type, &planes, &levels, &boundaries, &rotation, &hadamard,
                        &a.score_variance, &a.folded))
    return nullptr;
  a.plane_count = int(PyTuple_GET_SIZE(planes));
  for (int i = 0; i < a.plane_count; ++i)
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(planes, i), "iii", &a.planes[i].width, &a.planes[i].shift, &a.planes[i].offset))
      return nullptr;
  a.levels = (const float*)levels;
  a.boundaries = (const float*)boundaries;
  a.rotation = (const float*)rotation;
  a.hadamard = hadamard;
  return PyLong_FromVoidPtr(make_format(a));
}

// setup(exchange capsule, on_unknown_spec, empty_strided, (float32, bfloat16, float16), scale table address,
// (get_num_threads, in_parallel_region, GOMP_parallel) addresses or 0)
PyObject* py_setup(PyObject*, PyObject* args) {
  PyObject *capsule, *callback, *allocator, *dtypes;
  unsigned long long scales, threads, inside, fork;
  if (!PyArg_ParseTuple(args, "OOOO!K(KKK)", &capsule, &callback, &allocator, &PyTuple_Type, &dtypes, &scales, &threads,
                        &inside, &fork))
    return nullptr;
  exchange = (DLPackExchangeAPI*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!exchange) return nullptr;
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION) {
    PyErr_SetString(PyExc_RuntimeError, "torch's DLPack version is another one than its header's");
    return nullptr;
  }
  Py_INCREF(on_unknown_spec = callback);
  Py_INCREF(empty_strided = allocator);
  for (int i = 0; i < 3; ++i) Py_INCREF(torch_dtypes[i] = PyTuple_GetItem(dtypes, i));
  formats = PyDict_New();
  keyword_dtype = Py_BuildValue("(s)", "dtype");
  name_contiguous = PyUnicode_InternFromString("contiguous");
  memcpy(scale_factors, (const float*)scales, sizeof scale_factors);
  pool.threads = (int (*)())threads;
  pool.inside = (bool (*)())inside;
  pool.fork = (void (*)(void (*)(void*), void*, unsigned, unsigned))fork;
  Py_RETURN_NONE;
}

PyObject* py_use_int8(PyObject*, PyObject* on) {
  use_int8 = PyObject_IsTrue(on) == 1;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"use_int8", py_use_int8, METH_O, nullptr},
    {"append", (PyCFunction)(void (*)())py_append, METH_FASTCALL, nullptr},
    {"read", (PyCFunction)(void (*)())py_read, METH_FASTCALL, nullptr},
    {"attend", (PyCFunction)(void (*)())py_attend, METH_FASTCALL, nullptr},
    {"make_format", py_make_format, METH_VARARGS, nullptr},
    {"setup", py_setup, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_tqc_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace tqc

PyMODINIT_FUNC PyInit__tqc_cpu() { return PyModule_Create(&tqc::definition); }
