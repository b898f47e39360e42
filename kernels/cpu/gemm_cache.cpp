#include "kernels/cpu/gemm_cache.hpp"

#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>
#include <vector>

#include "kernels/cpu/context.hpp"
#include "kernels/cpu/gemm_f64.hpp"
#include "kernels/profile.hpp"

namespace arcus::cpu {
namespace {

using dnnl::memory;

/// oneDNN asks OpenMP how many threads it may use, both when a primitive is made and when it runs;
/// one problem runs on one thread here, else its bits would depend on the number of threads.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) {
    if (before_ != 1) omp_set_num_threads(1);
  }
  ~OneThread() {
    if (before_ != 1) omp_set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

memory::data_type dnnl_type(DType dtype) {
  ARCUS_CHECK(dtype == DType::f32 || dtype == DType::bf16, "no oneDNN matrix product of {}",
              name_of(dtype));
  return dtype == DType::f32 ? memory::data_type::f32 : memory::data_type::bf16;
}

/// op(stored) is [rows, cols]; `stride` separates the rows of the matrix as it is stored.
memory::desc matrix_desc(DType dtype, bool transposed, std::int64_t rows, std::int64_t cols,
                         std::int64_t stride) {
  const memory::dims strides = transposed ? memory::dims{1, stride} : memory::dims{stride, 1};
  return {{rows, cols}, dnnl_type(dtype), strides};
}

std::uint64_t hash_of(const GemmKey& key) {
  const auto flags = static_cast<std::int64_t>(key.ab_dtype) |
                     static_cast<std::int64_t>(key.c_dtype) << 8 |
                     std::int64_t{key.transpose_a} << 16 | std::int64_t{key.transpose_b} << 17 |
                     std::int64_t{key.accumulate} << 18 | std::int64_t{key.bias} << 19;
  std::uint64_t hash = 0;
  for (const std::int64_t part : {flags, key.m, key.n, key.k, key.lda, key.ldb, key.ldc}) {
    hash = (hash ^ static_cast<std::uint64_t>(part)) * 0x9E3779B97F4A7C15U;
    hash ^= hash >> 32;
  }
  return hash;
}

void check_native(DType dtype) {
  ARCUS_REQUIRE(dtype != DType::bf16 || bf16_is_native(), ExitCode::usage,
                "dtype bf16 needs AVX512_BF16 or AMX, which this processor lacks (or "
                "ONEDNN_MAX_CPU_ISA switches off); set train.dtype to f32");
}

bool has_isa(dnnl_cpu_isa_t wanted) {
  const auto bits = static_cast<unsigned>(wanted);
  return (static_cast<unsigned>(dnnl_get_effective_cpu_isa()) & bits) == bits;
}

/// A row tile whose operands are copied to scratch: dense rows, and zeros up to the tile's height.
struct CompactTile {
  explicit CompactTile(const GemmKey& wide)
      : key(wide),
        a_size(static_cast<std::int64_t>(size_of(wide.ab_dtype))),
        c_size(static_cast<std::int64_t>(size_of(wide.c_dtype))),
        a_row(wide.k * a_size),
        c_row(wide.n * c_size),
        a_bytes((wide.m * a_row + 127) / 128 * 128) {
    key.lda = key.k;
    key.ldc = key.n;
  }
  std::int64_t bytes() const { return a_bytes + key.m * c_row; }

  GemmKey key;
  std::int64_t a_size, c_size;  ///< bytes of an element
  std::int64_t a_row, c_row;    ///< bytes of a row
  std::int64_t a_bytes;
};

void copy_rows(void* to, std::int64_t to_stride, const void* from, std::int64_t from_stride,
               std::int64_t row_bytes, std::int64_t rows) {
  for (std::int64_t i = 0; i < rows; ++i) {
    std::memcpy(static_cast<char*>(to) + i * to_stride,
                static_cast<const char*>(from) + i * from_stride,
                static_cast<std::size_t>(row_bytes));
  }
}

/// The roles of memory objects, in the order of a primitive's arguments.
enum Role : std::size_t { kA, kB, kC, kBias, kScratch, kNumRoles };
constexpr std::array<int, kNumRoles> kArgument = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST,
                                                  DNNL_ARG_BIAS, DNNL_ARG_SCRATCHPAD};
using Handles = std::array<dnnl_memory_t, kNumRoles>;

struct Entry {
  GemmKey key;
  dnnl::matmul primitive;
  std::int64_t scratch_bytes = 0;
  std::vector<Handles> handles;  ///< per thread; null where the product has no such argument
};

/// Open addressing over pointers to entries. Readers need no lock: a slot is written once, and a
/// table that grew too small is replaced by a larger copy but kept until the end.
class Table {
 public:
  explicit Table(std::size_t capacity) : slots_(capacity) {}
  const Entry* find(const GemmKey& key) const {
    for (std::uint64_t i = hash_of(key);; ++i) {
      const Entry* entry = slots_[i & (slots_.size() - 1)].load(std::memory_order_acquire);
      if (entry == nullptr || entry->key == key) return entry;
    }
  }
  void insert(const Entry* entry) {
    std::uint64_t i = hash_of(entry->key);
    while (slots_[i & (slots_.size() - 1)].load(std::memory_order_relaxed) != nullptr) ++i;
    slots_[i & (slots_.size() - 1)].store(entry, std::memory_order_release);
  }
  std::size_t capacity() const { return slots_.size(); }

 private:
  std::vector<std::atomic<const Entry*>> slots_;  // a power of two
};

/// Memory that one thread alone grows and uses.
struct Buffer {
  std::unique_ptr<Arena> arena;
  void* get(std::int64_t bytes) {
    if (arena == nullptr || bytes > arena->capacity()) {
      arena = std::make_unique<Arena>("matrix product scratch", bytes);
    }
    arena->reset();
    return arena->allocate_bytes(bytes);
  }
  std::int64_t bytes() const { return arena == nullptr ? 0 : arena->capacity(); }
};

}  // namespace

struct GemmCache::Impl {
  explicit Impl(int num_threads)
      : engine(dnnl::engine::kind::cpu, 0), threads(static_cast<std::size_t>(num_threads)) {
    for (Thread& thread : threads) thread.stream = dnnl::stream(engine);
    tables.push_back(std::make_unique<Table>(1024));
    table.store(tables.back().get());
  }

  const Entry* find_or_build(const GemmKey& key, bool late);
  std::unique_ptr<Entry> make_entry(const GemmKey& key);
  void insert(std::unique_ptr<Entry> entry);
  void execute(int thread_idx, const Entry& entry, const void* a, const void* b, void* c,
               const void* bias);

  using MemoryKey = std::tuple<Role, DType, bool, std::int64_t, std::int64_t, std::int64_t>;
  struct alignas(128) Thread {
    dnnl::stream stream;
    Buffer scratchpad;
    Buffer padding;
    std::map<MemoryKey, memory> memories;  ///< shared by all products with such an argument
  };
  dnnl_memory_t intern(Thread& thread, const MemoryKey& key, const memory::desc& desc);

  dnnl::engine engine;
  std::vector<Thread> threads;
  std::atomic<const Table*> table{nullptr};
  std::atomic<std::int64_t> late{0};
  std::mutex build_mutex;  // guards everything below and each thread's `memories`
  std::vector<std::unique_ptr<Entry>> entries;
  std::vector<std::unique_ptr<Table>> tables;
};

dnnl_memory_t GemmCache::Impl::intern(Thread& thread, const MemoryKey& key,
                                      const memory::desc& desc) {
  const auto found = thread.memories.find(key);
  if (found != thread.memories.end()) return found->second.get();
  return thread.memories.emplace(key, memory(desc, engine, DNNL_MEMORY_NONE)).first->second.get();
}

std::unique_ptr<Entry> GemmCache::Impl::make_entry(const GemmKey& key) {
  check_native(key.ab_dtype);
  auto entry = std::make_unique<Entry>();
  entry->key = key;
  const memory::desc a = matrix_desc(key.ab_dtype, key.transpose_a, key.m, key.k, key.lda);
  const memory::desc b = matrix_desc(key.ab_dtype, key.transpose_b, key.k, key.n, key.ldb);
  const memory::desc c = matrix_desc(key.c_dtype, false, key.m, key.n, key.ldc);
  const memory::desc bias =
      key.bias ? matrix_desc(DType::f32, false, 1, key.n, key.n) : memory::desc();
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (key.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0F);
    attributes.set_post_ops(sum);
  }
  const auto desc = key.bias ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c);
  const dnnl::matmul::primitive_desc primitive_desc(desc, attributes, engine);
  entry->primitive = dnnl::matmul(primitive_desc);
  const memory::desc scratch = primitive_desc.scratchpad_desc();
  entry->scratch_bytes = static_cast<std::int64_t>(scratch.get_size());
  for (Thread& thread : threads) {
    Handles handles{};
    handles[kA] = intern(thread, {kA, key.ab_dtype, key.transpose_a, key.m, key.k, key.lda}, a);
    handles[kB] = intern(thread, {kB, key.ab_dtype, key.transpose_b, key.k, key.n, key.ldb}, b);
    handles[kC] = intern(thread, {kC, key.c_dtype, false, key.m, key.n, key.ldc}, c);
    if (key.bias) handles[kBias] = intern(thread, {kBias, DType::f32, false, 1, key.n, 0}, bias);
    if (entry->scratch_bytes > 0) {
      handles[kScratch] =
          intern(thread, {kScratch, DType::u8, false, 1, entry->scratch_bytes, 0}, scratch);
    }
    entry->handles.push_back(handles);
  }
  return entry;
}

void GemmCache::Impl::insert(std::unique_ptr<Entry> entry) {
  entries.push_back(std::move(entry));
  if (2 * entries.size() <= tables.back()->capacity()) {
    tables.back()->insert(entries.back().get());
    return;
  }
  auto larger = std::make_unique<Table>(2 * tables.back()->capacity());
  for (const auto& each : entries) larger->insert(each.get());
  tables.push_back(std::move(larger));
  table.store(tables.back().get(), std::memory_order_release);
}

const Entry* GemmCache::Impl::find_or_build(const GemmKey& key, bool is_late) {
  if (const Entry* entry = table.load(std::memory_order_acquire)->find(key)) return entry;
  const std::lock_guard lock(build_mutex);
  if (const Entry* entry = tables.back()->find(key)) return entry;
  try {
    const OneThread one_thread;
    insert(make_entry(key));
  } catch (const dnnl::error& error) {
    ARCUS_FAIL(
        ExitCode::internal,
        "oneDNN cannot build the product [{}, {}] = [{}, {}] x [{}, {}] of {}: {} (status {})",
        key.m, key.n, key.m, key.k, key.k, key.n, name_of(key.ab_dtype), error.what(),
        static_cast<int>(error.status));
  }
  if (is_late) ++late;
  return entries.back().get();
}

void GemmCache::Impl::execute(int thread_idx, const Entry& entry, const void* a, const void* b,
                              void* c, const void* bias) {
  Thread& thread = threads[static_cast<std::size_t>(thread_idx)];
  const Handles& handles = entry.handles[static_cast<std::size_t>(thread_idx)];
  void* scratch = entry.scratch_bytes > 0 ? thread.scratchpad.get(entry.scratch_bytes) : nullptr;
  const std::array<void*, kNumRoles> pointers = {const_cast<void*>(a), const_cast<void*>(b), c,
                                                 const_cast<void*>(bias), scratch};
  std::array<dnnl_exec_arg_t, kNumRoles> args;
  int num_args = 0;
  dnnl_status_t status = dnnl_success;
  for (std::size_t role = 0; role < kNumRoles; ++role) {
    if (handles[role] == nullptr) continue;
    status = std::max(status, dnnl_memory_set_data_handle(handles[role], pointers[role]));
    args[static_cast<std::size_t>(num_args++)] = {kArgument[role], handles[role]};
  }
  const OneThread one_thread;
  status = std::max(status, dnnl_primitive_execute(entry.primitive.get(), thread.stream.get(),
                                                   num_args, args.data()));
  ARCUS_CHECK(status == dnnl_success, "oneDNN failed with status {} in a product of {} x {} x {}",
              static_cast<int>(status), entry.key.m, entry.key.n, entry.key.k);
}

GemmCache::GemmCache(int num_threads) : impl_(std::make_unique<Impl>(num_threads)) {}
GemmCache::~GemmCache() = default;

void GemmCache::build(const GemmKey& key) {
  if (key.ab_dtype == DType::f64) {
    for (auto& thread : impl_->threads) thread.scratchpad.get(gemm_f64_panel_bytes(key));
    return;
  }
  const Entry* entry = impl_->find_or_build(key, false);
  if (entry->scratch_bytes == 0) return;
  for (auto& thread : impl_->threads) thread.scratchpad.get(entry->scratch_bytes);
}

void GemmCache::run(int thread, const GemmKey& key, const void* a, const void* b, void* c,
                    const void* bias) {
  if (key.ab_dtype == DType::f64) {
    void* panel =
        impl_->threads[static_cast<std::size_t>(thread)].scratchpad.get(gemm_f64_panel_bytes(key));
    gemm_f64(key, static_cast<const double*>(a), static_cast<const double*>(b),
             static_cast<double*>(c), static_cast<const double*>(bias), panel);
    return;
  }
  impl_->execute(thread, *impl_->find_or_build(key, true), a, b, c, bias);
}

void* GemmCache::padding(int thread, std::int64_t bytes) {
  return impl_->threads[static_cast<std::size_t>(thread)].padding.get(bytes);
}

std::int64_t GemmCache::num_primitives() const {
  const std::lock_guard lock(impl_->build_mutex);
  return static_cast<std::int64_t>(impl_->entries.size());
}
std::int64_t GemmCache::late_primitives() const { return impl_->late.load(); }
std::int64_t GemmCache::scratch_bytes() const {
  std::int64_t bytes = 0;
  for (const auto& thread : impl_->threads) {
    bytes += thread.scratchpad.bytes() + thread.padding.bytes();
  }
  return bytes;
}

void run_gemm(Context& context, int thread, const GemmKey& key, const void* a, const void* b,
              void* c, const void* bias) {
  if (context.profile() == nullptr) return context.gemm().run(thread, key, a, b, c, bias);
  Profile::Work& work = context.profile()->work(thread);
  work.gemm_flops += 2.0 * static_cast<double>(key.m) * static_cast<double>(key.n * key.k);
  const ThreadTimer timer(&work.gemm);
  context.gemm().run(thread, key, a, b, c, bias);
}

void build_gemm(Context& context, const GemmKey& key) { context.gemm().build(key); }

bool needs_fixed_rows(DType ab_dtype) {
  static const bool amx = has_isa(dnnl_cpu_isa_avx512_core_amx);
  static const bool avx512 = has_isa(dnnl_cpu_isa_avx512_core);
  return ab_dtype == DType::bf16 ? amx : ab_dtype == DType::f32 && !avx512;
}

bool bf16_is_native() {
  static const bool native = has_isa(dnnl_cpu_isa_avx512_core_bf16);
  return native;
}

std::int64_t row_tile_height(DType ab_dtype, std::int64_t n, std::int64_t k) {
  if (!needs_fixed_rows(ab_dtype)) return 256;
  // A multiple of the rows of every register block before AVX-512 (8, 16, 24), else the rows at a
  // tile's end would run through other code.
  if (ab_dtype == DType::f32) return 96;
  // A tall tile reads the weight less often, a low one wastes less on padding: large weights are
  // bound by the former.
  return n * k >= (std::int64_t{1} << 18) ? 128 : 64;
}

namespace {

/// Rows that the product of a tile of `rows` rows has.
std::int64_t product_rows(const Context& context, const GemmKey& key, std::int64_t rows) {
  if (!needs_fixed_rows(key.ab_dtype)) return rows;
  const std::int64_t height = row_tile_height(key.ab_dtype, key.n, key.k);
  if (!context.row_bits_may_differ()) return height;
  // AMX multiplies 16 rows at once, 32 with both of its accumulators; between them it is slow.
  constexpr std::int64_t kFastRows = 32;
  return std::min(height, (rows + kFastRows - 1) / kFastRows * kFastRows);
}

/// One tile; key.m is its height, `rows` of which exist.
void run_tile(Context& context, int thread, const GemmKey& key, std::int64_t rows, const void* a,
              const void* b, void* c, const void* bias) {
  const bool dense = key.lda == key.k && key.ldc == key.n;
  if (rows == key.m && dense) return run_gemm(context, thread, key, a, b, c, bias);
  // Rows beyond a's may belong to somebody else, and those beyond c's surely do.
  const CompactTile tile(key);
  char* compact_a = static_cast<char*>(context.gemm().padding(thread, tile.bytes()));
  char* compact_c = compact_a + tile.a_bytes;
  copy_rows(compact_a, tile.a_row, a, key.lda * tile.a_size, tile.a_row, rows);
  std::memset(compact_a + rows * tile.a_row, 0,
              static_cast<std::size_t>((key.m - rows) * tile.a_row));
  if (key.accumulate) {
    copy_rows(compact_c, tile.c_row, c, key.ldc * tile.c_size, tile.c_row, rows);
    std::memset(compact_c + rows * tile.c_row, 0,
                static_cast<std::size_t>((key.m - rows) * tile.c_row));
  }
  if (context.profile() != nullptr) {
    context.profile()->work(thread).padding_flops +=
        2.0 * static_cast<double>(key.m - rows) * static_cast<double>(key.n * key.k);
  }
  run_gemm(context, thread, tile.key, compact_a, b, compact_c, bias);
  copy_rows(c, key.ldc * tile.c_size, compact_c, tile.c_row, tile.c_row, rows);
}

}  // namespace

void run_gemm_rows(Context& context, int thread, GemmKey key, std::int64_t rows, const void* a,
                   const void* b, void* c, const void* bias) {
  const std::int64_t height = row_tile_height(key.ab_dtype, key.n, key.k);
  const std::int64_t a_step = key.lda * static_cast<std::int64_t>(size_of(key.ab_dtype));
  const std::int64_t c_step = key.ldc * static_cast<std::int64_t>(size_of(key.c_dtype));
  for (std::int64_t begin = 0; begin < rows; begin += height) {
    const std::int64_t tile_rows = std::min(height, rows - begin);
    key.m = product_rows(context, key, tile_rows);
    run_tile(context, thread, key, tile_rows, static_cast<const char*>(a) + begin * a_step, b,
             static_cast<char*>(c) + begin * c_step, bias);
  }
}

void build_gemm_tile(Context& context, GemmKey key, std::int64_t rows) {
  key.m = product_rows(context, key, rows);
  const CompactTile tile(key);
  build_gemm(context, tile.key);
  if (!needs_fixed_rows(key.ab_dtype) && key.lda == key.k && key.ldc == key.n) return;
  for (int thread = 0; thread < context.num_threads(); ++thread) {
    context.gemm().padding(thread, tile.bytes());
  }
}

}  // namespace arcus::cpu
