// The CPU kernels without Python, for another machine's instruction set under an emulator. Reads one file, writes one:
// keys and values are appended to empty stores, then one query attends to given stores, without and with int8 products.
#include <cstdio>
#include <vector>

#include "attend.h"
#include "storage.h"

namespace tqc {
Pool pool;
bool use_int8 = true;
float scale_factors[256];
thread_local Scratch scratch;
}  // namespace tqc

using namespace tqc;

// Arrays follow each other, each behind the number of its bytes.
static std::vector<char> read_array(FILE* file) {
  int64_t bytes = 0;
  if (fread(&bytes, 8, 1, file) != 1) abort();
  std::vector<char> data(bytes + 64);
  if (fread(data.data(), 1, bytes, file) != size_t(bytes)) abort();
  data.resize(bytes);
  return data;
}

struct Tensor {
  Format* format;
  std::vector<char> tokens, empty_dense, pages, dense, state, empty_pages;
  int64_t heads, count;

  explicit Tensor(FILE* file) {
    const auto numbers = read_array(file), levels = read_array(file), boundaries = read_array(file), rotation = read_array(file);
    const auto* n = (const int32_t*)numbers.data();
    FormatArguments a{n[0], n[1], n[2], n[3], n[4], n[5], n[6], {}, 0, (const float*)levels.data(),
                      (const float*)boundaries.data(), (const float*)rotation.data(), n[7] != 0, 0, 0, n[9]};
    memcpy(&a.score_stretch, n + 8, 4);
    heads = n[10];
    a.plane_count = n[11];
    for (int i = 0; i < a.plane_count; ++i) a.planes[i] = {n[12 + 3 * i], n[13 + 3 * i], n[14 + 3 * i]};
    format = make_format(a);
    tokens = read_array(file), empty_dense = read_array(file);
    pages = read_array(file), dense = read_array(file), state = read_array(file);
    count = tokens.size() / (4 * heads * format->dim);
    empty_pages.resize(pages.size());
  }
  Store store(std::vector<char>& p, std::vector<char>& d, State* s) const {
    const int64_t page = format->page_bytes, head_pages = p.size() / page / heads, row = 4 * format->dim;
    const int64_t head_dense = d.size() / heads;
    return {format, (uint8_t*)p.data(), 0, head_pages * page, page, head_pages, d.data(), 0, head_dense, row,
            head_dense / row, F32, s};
  }
  Dense news() { return {tokens.data(), 0, 4 * count * format->dim, 4 * format->dim, F32}; }
};

int main(int, char** argv) {
  FILE* in = fopen(argv[1], "rb");
  const auto scales = read_array(in);
  memcpy(scale_factors, scales.data(), sizeof scale_factors);
  Tensor k(in), v(in);
  auto query = read_array(in);
  FILE* out = fopen(argv[2], "wb");
  for (Tensor* tensor : {&k, &v}) {
    State state{};
    append({tensor->store(tensor->empty_pages, tensor->empty_dense, &state), tensor->news(), 1, tensor->heads, tensor->count, -1});
    fwrite(tensor->empty_pages.data(), 1, tensor->empty_pages.size(), out);
  }
  const int64_t rows = query.size() / (4 * k.format->dim), dim = v.format->dim;
  std::vector<float> result(rows * dim), lse(rows);
  AttendArgs a{};
  auto view = [](Tensor& t) {
    auto* s = (State*)t.state.data();
    return View{t.store(t.pages, t.dense, s), Dense{}, s->begin, s->length, s->packed, s->length, 0};
  };
  a.k = view(k);
  a.v = view(v);
  a.query = {query.data(), 0, 4 * k.format->dim, 4 * k.format->dim, F32};
  a.out = {(char*)result.data(), 0, 4 * dim, 4 * dim, F32};
  a.lse = lse.data();
  a.batch = 1;
  a.heads = k.heads;
  a.group = rows / k.heads;
  a.rows = 1;
  a.begin = a.k.begin;
  a.end = a.k.length;
  a.scale = 1 / std::sqrt(float(k.format->dim));
  for (bool on : {false, true}) {
    use_int8 = on;
    attend(a);
    fwrite(result.data(), 4, result.size(), out);
  }
  return fclose(out);
}
