// The arguments of the ops, from Python objects or from torch's tensor handles: checked, and turned into what the kernels
// take. A tensor is read through the DLPack exchange interface that torch.Tensor publishes, a handle through the C
// interface that Inductor's own code calls; torch's C++ headers are not needed.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "attend.h"
#include "storage.h"

namespace tqc {

using Handle = AtenTensorHandle;

// Not inline: the modules of two levels in one process would share such variables.
extern DLPackExchangeAPI* exchange;
extern PyObject *formats, *on_unknown_spec, *name_contiguous;

struct Failure {};  // a Python error is set

[[noreturn]] inline void fail(PyObject* type, const char* message) {
  PyErr_SetString(type, message);
  throw Failure{};
}

inline void check(AOTITorchError code) {
  if (code) fail(PyExc_RuntimeError, "a call of torch's C interface failed");
}

inline bool absent(PyObject* o) { return o == Py_None; }
inline bool absent(Handle h) { return !h; }

inline DLDataType dtype_of(int32_t code) {
  if (code == aoti_torch_dtype_float32()) return {kDLFloat, 32, 1};
  if (code == aoti_torch_dtype_bfloat16()) return {kDLBfloat, 16, 1};
  if (code == aoti_torch_dtype_float16()) return {kDLFloat, 16, 1};
  if (code == aoti_torch_dtype_int64()) return {kDLInt, 64, 1};
  if (code == aoti_torch_dtype_uint8()) return {kDLUInt, 8, 1};
  if (code == aoti_torch_dtype_bool()) return {kDLBool, 8, 1};
  return {kDLOpaqueHandle, 8, 1};
}

struct Array {
  DLTensor t;
  PyObject* owned = nullptr;
  ~Array() { Py_XDECREF(owned); }
  Array() = default;
  Array(const Array&) = delete;

  void get(PyObject* o, int ndim, const char* name) {
    if (exchange->dltensor_from_py_object_no_sync(o, &t) != 0) throw Failure{};
    expect(ndim, name);
  }
  void get(Handle h, int ndim, const char* name) {
    int64_t count;
    int32_t dtype, device;
    check(aoti_torch_get_data_ptr(h, &t.data));
    check(aoti_torch_get_dim(h, &count));
    check(aoti_torch_get_sizes(h, &t.shape));
    check(aoti_torch_get_strides(h, &t.strides));
    check(aoti_torch_get_dtype(h, &dtype));
    check(aoti_torch_get_device_type(h, &device));
    t.ndim = int(count);
    t.dtype = dtype_of(dtype);
    t.byte_offset = 0;
    t.device = {device == aoti_torch_device_type_cpu() ? kDLCPU : kDLExtDev, 0};
    expect(ndim, name);
  }
  // As `get`, and the last axis contiguous: an object by a copy if need be.
  void get_rows(PyObject* o, const char* name) {
    get(o, 4, name);
    if (t.strides[3] == 1) return;
    owned = PyObject_CallMethodNoArgs(o, name_contiguous);
    if (!owned) throw Failure{};
    get(owned, 4, name);
  }
  void get_rows(Handle h, const char* name) {
    get(h, 4, name);
    if (t.strides[3] == 1 || t.shape[3] == 1) return;
    PyErr_Format(PyExc_ValueError, "%s must be contiguous along its last axis", name);
    throw Failure{};
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

 private:
  void expect(int ndim, const char* name) {
    if (t.device.device_type != kDLCPU) fail(PyExc_ValueError, "the cpu provider takes CPU tensors");
    if (ndim >= 0 && t.ndim != ndim) {
      PyErr_Format(PyExc_ValueError, "%s must have %d dimensions, got %d", name, ndim, int(t.ndim));
      throw Failure{};
    }
  }
};

inline const Format* format_of(PyObject* spec) {
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

// Keys or values of a packed cache: pages, dense, state and the format's spec.
template <class T>
struct Packed {
  T pages, dense, state;
  PyObject* spec;
};

// While nothing was packed `dense` may have fewer rows; where tokens are dropped pages take slots in turns.
inline void expect_room(const Store& s, const State& state) {
  const Format& f = *s.f;
  const int64_t pages = state.packed / f.block_tokens, tokens = state.length;
  if (s.dense_rows < f.dense_rows() && (pages || tokens > s.dense_rows)) {
    PyErr_Format(PyExc_ValueError, "dense is too small: it has %lld rows, %lld tokens take %lld", (long long)s.dense_rows,
                 (long long)tokens, pages ? (long long)f.dense_rows() : (long long)tokens);
    throw Failure{};
  }
  const int64_t slots = f.keep == KEEP_ALL ? pages : std::min(pages, f.slots());
  if (slots <= s.page_count) return;
  PyErr_Format(PyExc_ValueError, "pages are full: there are %lld, %lld tokens take %lld", (long long)s.page_count,
               (long long)tokens, (long long)slots);
  throw Failure{};
}

template <class T>
Store store_of(const Packed<T>& p, Array& dense) {
  Array pages, state;
  const Format* f = format_of(p.spec);
  pages.get(p.pages, 4, "pages");
  dense.get(p.dense, 4, "dense");
  state.get(p.state, 1, "state");
  if (!pages.is(kDLUInt, 8) || pages.size(3) != f->block_bytes || (pages.t.strides[3] != 1 && pages.size(2)))
    fail(PyExc_ValueError, "pages do not fit the spec");
  if (dense.size(3) != f->dim || dense.size(2) > f->dense_rows() || dense.t.strides[3] != 1)
    fail(PyExc_ValueError, "dense does not fit the spec");
  if (pages.size(0) != dense.size(0) || pages.size(1) != dense.size(1))
    fail(PyExc_ValueError, "pages and dense differ in batch or heads");
  if (!state.is(kDLInt, 64) || state.size(0) != 3 || state.t.strides[0] != 1)
    fail(PyExc_ValueError, "state must be int64 [3]");
  Store s{f,
          (uint8_t*)pages.data(), pages.stride(0), pages.stride(1), pages.stride(2), pages.size(2),
          dense.data(), dense.stride(0), dense.stride(1), dense.stride(2), dense.size(2),
          dense.dtype("dense"), (State*)state.data()};
  expect_room(s, *s.state);
  return s;
}

// The first element of `start`, or -1 if there is none.
template <class T>
int64_t start_of(T o, int64_t begin) {
  if (absent(o)) return -1;
  Array start;
  start.get(o, -1, "start");
  if (!start.is(kDLInt, 64)) fail(PyExc_TypeError, "start must be int64");
  int64_t first = *(int64_t*)start.data();
  if (first >= begin) return first;
  if (begin == 0) fail(PyExc_ValueError, "start must not be negative");
  PyErr_Format(PyExc_ValueError, "start must not lie before token %lld, the first that is held, got %lld", (long long)begin,
               (long long)first);
  throw Failure{};
}

template <class T>
void append_op(const Packed<T>& to, T new_tokens, T start) {
  Array dense, news;
  AppendArgs a;
  a.store = store_of(to, dense);
  news.get_rows(new_tokens, "new");
  a.batch = dense.size(0);
  a.heads = dense.size(1);
  a.count = news.size(2);
  if (news.size(0) != a.batch || news.size(1) != a.heads || news.size(3) != a.store.f->dim)
    fail(PyExc_ValueError, "new does not fit the stored shape");
  if (news.dtype("new") != a.store.dtype) fail(PyExc_TypeError, "new and dense differ in dtype");
  a.news = {news.data(), news.stride(0), news.stride(1), news.stride(2), a.store.dtype};
  a.start = start_of(start, a.store.state->begin);
  const State after = state_after(a);
  expect_room(a.store, after);
  if (after.packed != a.store.state->packed && !a.store.f->tiers.empty())
    fail(PyExc_ValueError, "tokens of groups are packed by their scores, and there are none");
  if (a.count * a.batch * a.heads < 512) return append(a);
  Py_BEGIN_ALLOW_THREADS append(a);
  Py_END_ALLOW_THREADS
}

// Writes the last queries to where the scorer of the groups of keys finds them, behind the append of their tokens.
template <class T>
void remember_op(const Packed<T>& keys, T queries) {
  Array dense, query;
  const Store s = store_of(keys, dense);
  const Format& f = *s.f;
  query.get_rows(queries, "query");
  const int64_t batch = dense.size(0), heads = dense.size(1), repeats = query.size(1) / std::max<int64_t>(1, heads);
  const int64_t count = query.size(2);
  float row[MAX_HEAD_DIM];
  for (int64_t i = std::max<int64_t>(0, count - f.query_ring); i < count; ++i) {
    const int64_t at = f.token_rows() + f.head_rows() + (s.state->length - count + i) % f.query_ring;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads * repeats; ++h) {
        to_float(row, query.data() + b * query.stride(0) + h * query.stride(1) + i * query.stride(2), f.dim, query.dtype("query"));
        from_float(s.row(b, h / repeats, at + h % repeats * f.query_ring), row, f.dim, s.dtype);
      }
  }
}

template <class T>
struct AttendInputs {
  T query, key, value, mask, sinks, start;
  Packed<T> k, v;
  float scale, softcap;
  bool causal;
};

template <class T>
Mask mask_of(T o, Array& mask, const AttendArgs& a, int64_t* columns) {
  Mask m;
  *columns = 0;
  if (absent(o)) return m;
  mask.get(o, -1, "attn_mask");
  m.dtype = mask.is(kDLBool, 8) ? BOOL : mask.dtype("attn_mask, if not bool,");
  m.data = mask.data();
  const int64_t full[] = {a.batch, a.heads * a.group, a.rows, a.end - a.begin};
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

inline void view_of(View& view, const Store& store, int64_t length, const Array& news, bool fresh) {
  view.store = store;
  view.begin = store.state->begin;
  view.length = length;
  view.stored = std::min(store.state->length, length);
  view.packed = store.state->packed;
  view.fresh = 0;
  if (!fresh) return;
  view.news = {news.data(), news.stride(0), news.stride(1), news.stride(2), news.dtype("key and value")};
  view.fresh = news.size(2);
}

// Attends; `allocate(out sizes, out strides, dtype, out, lse)` makes the results, and may leave `lse` null.
template <class T, class Allocate>
void attend_op(const AttendInputs<T>& in, Allocate allocate) {
  Array query, k_dense, v_dense, key, value, mask, sinks, out;
  AttendArgs a;
  Store k = store_of(in.k, k_dense);
  Store v = store_of(in.v, v_dense);
  query.get_rows(in.query, "query");
  a.batch = k_dense.size(0);
  a.heads = k_dense.size(1);
  const int64_t query_heads = query.size(1);
  a.group = a.heads ? query_heads / a.heads : 1;
  a.rows = query.size(2);
  if (query.size(0) != a.batch || a.group * a.heads != query_heads || query.size(3) != k.f->dim)
    fail(PyExc_ValueError, "query does not fit the stored keys");
  if (v_dense.size(0) != a.batch || v_dense.size(1) != a.heads)
    fail(PyExc_ValueError, "keys and values differ in batch or heads");
  const bool fresh = !absent(in.key);
  if (fresh == absent(in.value)) fail(PyExc_ValueError, "key and value must both be given or both be None");
  if (fresh) {
    key.get_rows(in.key, "key");
    value.get_rows(in.value, "value");
    if (key.size(0) != a.batch || key.size(1) != a.heads || key.size(3) != k.f->dim || value.size(0) != a.batch ||
        value.size(1) != a.heads || value.size(3) != v.f->dim || key.size(2) != value.size(2))
      fail(PyExc_ValueError, "key and value do not fit the stored ones");
  }
  const int64_t start = start_of(in.start, k.state->begin);
  const int64_t k_length = k.state->length, v_length = v.state->length, length = start >= 0 ? start : k_length;
  if (std::min(k_length, length) != (start >= 0 ? std::min(v_length, length) : v_length)) {
    PyErr_Format(PyExc_ValueError, "k_state and v_state must agree: %lld keys are stored and %lld values",
                 (long long)k_length, (long long)v_length);
    throw Failure{};
  }
  if (k.state->begin != v.state->begin) {
    PyErr_Format(PyExc_ValueError, "k_state and v_state must agree: keys are held from token %lld on, values from %lld on",
                 (long long)k.state->begin, (long long)v.state->begin);
    throw Failure{};
  }
  const auto same_pages = [](const Tier& one, const Tier& other) { return one.pages == other.pages; };
  if (k.f->block_tokens != v.f->block_tokens ||
      !std::equal(k.f->tiers.begin(), k.f->tiers.end(), v.f->tiers.begin(), v.f->tiers.end(), same_pages))
    fail(PyExc_ValueError, "keys and values are in other groups");
  if (start >= 0 && start != k_length && !k.f->tiers.empty())
    fail(PyExc_ValueError, "a cache with groups of tokens has no part that could be read alone");
  view_of(a.k, k, length, key, fresh);
  view_of(a.v, v, length, value, fresh);
  a.begin = a.k.begin;
  a.end = length + a.k.fresh;
  int64_t mask_columns;
  a.mask = mask_of(in.mask, mask, a, &mask_columns);
  a.end = std::max(a.end, a.begin + mask_columns);
  a.scale = in.scale;
  a.softcap = in.softcap;
  a.causal = in.causal;

  float logits[1024];
  a.sinks = nullptr;
  if (!absent(in.sinks)) {
    sinks.get(in.sinks, 1, "sinks");
    if (sinks.size(0) != query_heads || query_heads > 1024) fail(PyExc_ValueError, "sinks must be [query heads]");
    for (int64_t i = 0; i < query_heads; ++i)
      logits[i] = scalar_to_float(sinks.data() + i * sinks.stride(0), sinks.dtype("sinks"));
    a.sinks = logits;
  }

  // Laid out so that out.transpose(1, 2), which models ask for next, is contiguous.
  const int64_t dim = v.f->dim, sizes[] = {a.batch, query_heads, a.rows, dim};
  const int64_t strides[] = {a.rows * query_heads * dim, dim, query_heads * dim, 1};
  const Dtype dtype = query.dtype("query");
  allocate(sizes, strides, dtype, out, &a.lse);
  a.query = {query.data(), query.stride(0), query.stride(1), query.stride(2), dtype};
  const int bytes = dtype_bytes(dtype);
  a.out = {out.data(), strides[0] * bytes, strides[1] * bytes, strides[2] * bytes, dtype};
  if (a.batch * a.heads * a.rows == 0) return;
  Py_BEGIN_ALLOW_THREADS attend(a);
  Py_END_ALLOW_THREADS
}

}  // namespace tqc
