// The extension module: what Python calls.
#include <memory>

#include "chain.h"

namespace tqc {

Pool pool;
bool use_int8 = true;
float scale_factors[256];
thread_local Scratch scratch;
DLPackExchangeAPI* exchange;
PyObject *formats, *on_unknown_spec, *name_contiguous;

namespace {

PyObject *empty_strided, *keyword_dtype, *torch_dtypes[3];

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

PyObject* read_op(PyObject* const* args) {
  Array dense;
  Store store = store_of(Packed<PyObject*>{args[0], args[1], args[2], args[4]}, dense);
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

PyObject* attend_op(PyObject* const* args) {
  AttendInputs<PyObject*> in{args[0], args[7], args[8], args[9], args[10], args[11],
                             {args[1], args[2], args[3], args[15]}, {args[4], args[5], args[6], args[16]}};
  in.scale = float(PyFloat_AsDouble(args[12]));
  in.softcap = float(PyFloat_AsDouble(args[13]));
  in.causal = PyObject_IsTrue(args[14]) == 1;
  if (PyErr_Occurred()) throw Failure{};
  PyObject* result = PyTuple_New(2);
  try {
    attend_op(in, [&](const int64_t* sizes, const int64_t* strides, Dtype dtype, Array& out, float** lse_data) {
      const int64_t lse_strides[] = {sizes[1] * sizes[2], sizes[2], 1};
      Array lse;
      PyTuple_SET_ITEM(result, 0, allocate(4, sizes, strides, dtype));
      PyTuple_SET_ITEM(result, 1, allocate(3, sizes, lse_strides, F32));
      out.get(PyTuple_GET_ITEM(result, 0), 4, "out");
      lse.get(PyTuple_GET_ITEM(result, 1), 3, "lse");
      *lse_data = (float*)lse.data();
    });
  } catch (Failure&) {
    Py_DECREF(result);
    throw;
  }
  return result;
}

PyObject* py_append(PyObject*, PyObject* const* args, Py_ssize_t n) try {
  expect(n, 6);
  append_op(Packed<PyObject*>{args[0], args[1], args[2], args[5]}, args[3], args[4]);
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

std::vector<int> slots_of(PyObject* tuple) {
  std::vector<int> slots;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) slots.push_back(int(PyLong_AsLong(PyTuple_GET_ITEM(tuple, i))));
  return slots;
}

void delete_chain(PyObject* capsule) { delete (Chain*)PyCapsule_GetPointer(capsule, "chain"); }

Chain& chain_of(PyObject* o) {
  auto* chain = (Chain*)PyCapsule_GetPointer(o, "chain");
  if (!chain) throw Failure{};
  return *chain;
}

// make_chain(inputs, slots, outputs) -> capsule of a chain without steps.
PyObject* py_make_chain(PyObject*, PyObject* args) try {
  PyObject* outputs;
  auto chain = std::make_unique<Chain>();
  if (!PyArg_ParseTuple(args, "iiO!", &chain->inputs, &chain->slots, &PyTuple_Type, &outputs)) return nullptr;
  chain->outputs = slots_of(outputs);
  return PyErr_Occurred() ? nullptr : PyCapsule_New(chain.release(), "chain", delete_chain);
} catch (Failure&) {
  return nullptr;
}

// The fields of a step by their names, see `Instruction` and tqc/execute/chains.py.
PyObject* py_add_region(PyObject*, PyObject* args, PyObject* named) try {
  static const char* names[] = {"chain", "entry", "inputs", "outputs", "last", nullptr};
  PyObject *chain, *inputs, *outputs, *last;
  unsigned long long entry;
  Instruction step;
  if (!PyArg_ParseTupleAndKeywords(args, named, "OKO!O!O!", (char**)names, &chain, &entry, &PyTuple_Type, &inputs,
                                   &PyTuple_Type, &outputs, &PyTuple_Type, &last))
    return nullptr;
  step.entry = (Entry)entry;
  step.inputs = slots_of(inputs);
  step.outputs = slots_of(outputs);
  step.last = slots_of(last);
  if (PyErr_Occurred()) return nullptr;
  chain_of(chain).instructions.push_back(std::move(step));
  Py_RETURN_NONE;
} catch (Failure&) {
  return nullptr;
}

PyObject* py_add_attention(PyObject*, PyObject* args, PyObject* named) try {
  static const char* names[] = {"chain", "query", "key",      "value", "positions", "attn_mask", "sinks", "caches",
                                "out",   "scale", "softcap", "is_causal", "dead",     nullptr};
  PyObject *chain, *dead;
  int causal;
  Instruction step;
  if (!PyArg_ParseTupleAndKeywords(args, named, "OiiiiiiiiffpO!", (char**)names, &chain, &step.query, &step.key,
                                   &step.value, &step.positions, &step.mask, &step.sinks, &step.caches, &step.out,
                                   &step.scale, &step.softcap, &causal, &PyTuple_Type, &dead))
    return nullptr;
  step.causal = causal;
  step.dead = slots_of(dead);
  if (PyErr_Occurred()) return nullptr;
  chain_of(chain).instructions.push_back(std::move(step));
  Py_RETURN_NONE;
} catch (Failure&) {
  return nullptr;
}

// run_chain(chain, handles, specs, capacities, in_python) -> handles; see `run_chain` and `attend_in_python`.
PyObject* py_run_chain(PyObject*, PyObject* const* args, Py_ssize_t n) try {
  expect(n, 5);
  Chain& chain = chain_of(args[0]);
  if (!PyList_Check(args[1]) || !PyList_Check(args[2]) || !PyList_Check(args[3]) || PyList_GET_SIZE(args[1]) != chain.inputs)
    fail(PyExc_TypeError, "a chain takes lists of its inputs' handles, of specs and of capacities");
  return run_chain(chain, args[1], args[2], args[3], args[4]);
} catch (Failure&) {
  return nullptr;
}

// chain_seconds(chain) -> (in regions, in attention, in appending), since it was last asked.
PyObject* py_chain_seconds(PyObject*, PyObject* o) try {
  double* seconds = chain_of(o).seconds;
  PyObject* result = Py_BuildValue("(ddd)", seconds[0], seconds[1], seconds[2]);
  std::fill(seconds, seconds + 3, 0.0);
  return result;
} catch (Failure&) {
  return nullptr;
}

// make_format(dim, bits, centred, sink_tokens, window, page_bytes, centre_offset, planes, levels, boundaries, rotation,
// is_hadamard, score_stretch, folded, keep, block_tokens, block_bytes, places_offset, score_rows, query_ring, tiers) ->
// address; levels, boundaries and rotation are addresses of float32 arrays, tiers are (spec, pages, offset).
PyObject* py_make_format(PyObject*, PyObject* args) try {
  FormatArguments a{};
  PyObject *planes, *tiers;
  unsigned long long levels, boundaries, rotation;
  long long keep;
  int hadamard;
  if (!PyArg_ParseTuple(args, "iiiiiiiO!KKKifiLiiiiiO!", &a.dim, &a.bits, &a.centred, &a.sink_tokens, &a.window, &a.page_bytes,
                        &a.centre_offset, &PyTuple_Type, &planes, &levels, &boundaries, &rotation, &hadamard,
                        &a.score_stretch, &a.folded, &keep, &a.block_tokens, &a.block_bytes, &a.places_offset,
                        &a.score_rows, &a.query_ring, &PyTuple_Type, &tiers))
    return nullptr;
  a.plane_count = int(PyTuple_GET_SIZE(planes));
  for (int i = 0; i < a.plane_count; ++i)
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(planes, i), "iii", &a.planes[i].width, &a.planes[i].shift, &a.planes[i].offset))
      return nullptr;
  a.levels = (const float*)levels;
  a.boundaries = (const float*)boundaries;
  a.rotation = (const float*)rotation;
  a.hadamard = hadamard;
  a.keep = keep;
  Format* made = make_format(a);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tiers); ++i) {
    PyObject* spec;
    Tier tier;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(tiers, i), "Oii", &spec, &tier.pages, &tier.offset)) return nullptr;
    tier.f = format_of(spec);
    made->tiers.push_back(tier);
  }
  return PyLong_FromVoidPtr(made);
} catch (Failure&) {
  return nullptr;
}

// setup(exchange capsule, on_unknown_spec, empty_strided, (float32, bfloat16, float16), scale table address,
// (torch_get_num_threads, torch_parallel_for) addresses or 0)
PyObject* py_setup(PyObject*, PyObject* args) {
  PyObject *capsule, *callback, *allocator, *dtypes;
  unsigned long long scales, threads, loop;
  if (!PyArg_ParseTuple(args, "OOOO!K(KK)", &capsule, &callback, &allocator, &PyTuple_Type, &dtypes, &scales, &threads,
                        &loop))
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
  pool.threads = (decltype(pool.threads))threads;
  pool.loop = (decltype(pool.loop))loop;
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
    {"make_chain", py_make_chain, METH_VARARGS, nullptr},
    {"add_region", (PyCFunction)(void (*)())py_add_region, METH_VARARGS | METH_KEYWORDS, nullptr},
    {"add_attention", (PyCFunction)(void (*)())py_add_attention, METH_VARARGS | METH_KEYWORDS, nullptr},
    {"run_chain", (PyCFunction)(void (*)())py_run_chain, METH_FASTCALL, nullptr},
    {"chain_seconds", py_chain_seconds, METH_O, nullptr},
    {"make_format", py_make_format, METH_VARARGS, nullptr},
    {"setup", py_setup, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_tqc_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace tqc

PyMODINIT_FUNC PyInit__tqc_cpu() { return PyModule_Create(&tqc::definition); }
