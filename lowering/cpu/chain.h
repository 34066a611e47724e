// Consecutive layers of a step in one call: compiled regions and attention to packed caches in turn, without Python
// between them. A chain is a list of instructions over slots that hold tensor handles.
#pragma once
#include <chrono>
#include <exception>
#include <vector>

#include "arguments.h"

namespace tqc {

// What Inductor's C++ wrapper exports: it takes the inputs over, and gives outputs away.
using Entry = void (*)(Handle*, Handle*);

struct Instruction {
  Entry entry = nullptr;  // of a region; null for attention
  std::vector<int> inputs, outputs;  // a region's slots
  std::vector<int> last;             // of each input, whether nobody reads its slot later
  // Attention: slots or -1. Behind `caches` lie pages, dense and state of keys and of values.
  int query, key, value, positions, mask, sinks, out, caches;
  std::vector<int> dead;  // slots that nobody reads later
  float scale, softcap;
  bool causal;
};

struct Chain {
  int inputs, slots;
  std::vector<Instruction> instructions;
  std::vector<int> outputs;
  double seconds[3] = {};  // in regions, attention and appending, since they were last asked for
};

// Handles owned for the time of one run.
struct Slots {
  std::vector<Handle> handles;
  ~Slots() {
    for (int i = 0; i < int(handles.size()); ++i) drop(i);
  }
  void drop(int i) {
    if (handles[i]) aoti_torch_delete_tensor_object(handles[i]);
    handles[i] = nullptr;
  }
  Handle share(int i) const {
    Handle copy;
    check(aoti_torch_new_tensor_handle(handles[i], &copy));
    return copy;
  }
  Handle take(int i) {
    Handle taken = handles[i];
    handles[i] = nullptr;
    return taken;
  }
  Handle at(int i) const { return i < 0 ? nullptr : handles[i]; }
};

inline int32_t torch_dtype(Dtype dtype) {
  return dtype == F32 ? aoti_torch_dtype_float32() : dtype == BF16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float16();
}

inline PyObject* capsule(Handle h) {
  PyObject* made = PyCapsule_New(h, nullptr, nullptr);
  if (!made) {
    aoti_torch_delete_tensor_object(h);
    throw Failure{};
  }
  return made;
}

inline Handle handle_of(PyObject* o) {
  void* pointer = PyCapsule_GetPointer(o, nullptr);
  if (!pointer) throw Failure{};
  return (Handle)pointer;
}

inline void run_region(const Instruction& step, Slots& slots) {
  std::vector<Handle> inputs, outputs(step.outputs.size());
  inputs.reserve(step.inputs.size());
  try {
    for (size_t i = 0; i < step.inputs.size(); ++i)
      inputs.push_back(step.last[i] ? slots.take(step.inputs[i]) : slots.share(step.inputs[i]));
  } catch (Failure&) {
    for (Handle h : inputs) aoti_torch_delete_tensor_object(h);
    throw;
  }
  try {
    step.entry(inputs.data(), outputs.data());
  } catch (std::exception& e) {
    fail(PyExc_RuntimeError, e.what());
  }
  for (size_t i = 0; i < outputs.size(); ++i) slots.handles[step.outputs[i]] = outputs[i];
  if (PyErr_Occurred()) throw Failure{};
}

// Whether the new tokens can be written at their positions without a look at what lies behind them.
inline bool is_append(const Instruction& step, const Slots& slots, int64_t capacity) {
  Array positions, key, state;
  positions.get(slots.at(step.positions), -1, "positions");
  key.get(slots.at(step.key), 4, "key");
  state.get(slots.at(step.caches + 2), 1, "state");
  if (!positions.is(kDLInt, 64)) fail(PyExc_TypeError, "positions must be int64");
  const int64_t first = *(int64_t*)positions.data(), count = key.size(2);
  if (first < 0 || first + count > capacity) {
    PyErr_Format(PyExc_IndexError, "positions %lld to %lld are outside of a cache of %lld tokens", (long long)first,
                 (long long)(first + count - 1), (long long)capacity);
    throw Failure{};
  }
  return step.mask < 0 || first + count >= *(int64_t*)state.data();
}

// Has `in_python(index, capsules)` attend and write: those of query, key, value, positions, mask and sinks that are there.
inline Handle attend_in_python(PyObject* in_python, int index, const Instruction& step, const Slots& slots) {
  PyObject* list = PyList_New(0);
  if (!list) throw Failure{};
  for (int slot : {step.query, step.key, step.value, step.positions, step.mask, step.sinks}) {
    if (slot < 0) continue;
    PyObject* item = capsule(slots.share(slot));
    PyList_Append(list, item);
    Py_DECREF(item);
  }
  PyObject* result = PyObject_CallFunction(in_python, "iN", index, list);
  if (!result) throw Failure{};
  Handle out = (Handle)PyCapsule_GetPointer(result, nullptr);
  Py_DECREF(result);
  if (!out) throw Failure{};
  return out;
}

// `capacity`: of a preallocated cache, else -1.
inline void run_attention(Chain& chain, int index, const Instruction& step, Slots& slots, PyObject* specs,
                          int64_t capacity, PyObject* in_python) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  auto packed = [&](int first, int which) {
    return Packed<Handle>{slots.at(first), slots.at(first + 1), slots.at(first + 2), PyList_GET_ITEM(specs, which)};
  };
  AttendInputs<Handle> in{slots.at(step.query), slots.at(step.key), slots.at(step.value), slots.at(step.mask),
                          slots.at(step.sinks), slots.at(step.positions), packed(step.caches, 2 * index),
                          packed(step.caches + 3, 2 * index + 1), step.scale, step.softcap, step.causal};
  if (capacity >= 0 && !is_append(step, slots, capacity)) {
    slots.handles[step.out] = attend_in_python(in_python, index, step, slots);
    chain.seconds[1] += std::chrono::duration<double>(Clock::now() - begin).count();
  } else {
    attend_op(in, [&](const int64_t* sizes, const int64_t* strides, Dtype dtype, Array& out, float** lse) {
      Handle made;
      check(aoti_torch_empty_strided(4, sizes, strides, torch_dtype(dtype), aoti_torch_device_type_cpu(), 0, &made));
      slots.handles[step.out] = made;
      out.get(made, 4, "out");
      *lse = nullptr;
    });
    const auto attended = Clock::now();
    append_op(in.k, in.key, in.start);
    append_op(in.v, in.value, in.start);
    if (format_of(in.k.spec)->query_ring) remember_op(in.k, in.query);
    chain.seconds[1] += std::chrono::duration<double>(attended - begin).count();
    chain.seconds[2] += std::chrono::duration<double>(Clock::now() - attended).count();
  }
  for (int slot : step.dead) slots.drop(slot);
}

// Runs a chain over a list of capsules, whose handles it takes over; a list of capsules comes out. `specs` are those of
// keys and values of each attention, `capacities` how many tokens its caches can hold, -1 where they grow.
inline PyObject* run_chain(Chain& chain, PyObject* inputs, PyObject* specs, PyObject* capacities, PyObject* in_python) {
  Slots slots;
  slots.handles.resize(chain.slots);
  for (int i = 0; i < PyList_GET_SIZE(inputs); ++i) slots.handles[i] = handle_of(PyList_GET_ITEM(inputs, i));
  int attentions = 0;
  for (const Instruction& step : chain.instructions) {
    if (!step.entry) {
      const int64_t capacity = PyLong_AsLongLong(PyList_GET_ITEM(capacities, attentions));
      run_attention(chain, attentions++, step, slots, specs, capacity, in_python);
      continue;
    }
    const auto begin = std::chrono::steady_clock::now();
    run_region(step, slots);
    chain.seconds[0] += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  PyObject* results = PyList_New(chain.outputs.size());
  if (!results) throw Failure{};
  try {
    for (size_t i = 0; i < chain.outputs.size(); ++i)
      PyList_SET_ITEM(results, i, capsule(slots.take(chain.outputs[i])));
  } catch (Failure&) {
    Py_DECREF(results);
    throw;
  }
  return results;
}

}  // namespace tqc
