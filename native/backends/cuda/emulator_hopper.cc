#include "backends/cuda/emulator_hopper.h"

#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "core/half.h"

namespace emulator {

namespace {

constexpr int kGroupThreads = 128;  // of a warpgroup

struct MBarrier {
  uint32_t arrivals = 0, missing = 0;
  int64_t bytes = 0;  // announced and not yet there
  uint64_t phase = 0;
  std::vector<std::pair<int64_t, std::function<void()>>> copies;
};
std::map<void*, MBarrier> barriers;

// A product of a warpgroup, with its operands as they were when its first thread issued it.
struct Issued {
  Product product;
  std::vector<uint16_t> a, b;
  std::vector<float> a_values, b_values;  // once checked
  int done = 0;
};
struct Group {
  uint64_t first = 0;  // the number of products.front()
  std::deque<Issued> products;
};
struct Mine {
  uint64_t number;
  float* d;
  const uint32_t* a;
};
struct Thread {
  uint64_t issued = 0;
  bool fenced = false;
  std::vector<Mine> open;
  std::deque<std::vector<Mine>> groups;
};
std::vector<Group> groups;
std::vector<Thread> own;

// The 128-byte swizzle is by address: which of its eight 16-byte chunks a line of 128 bytes means is
// exchanged by the line's number (Swizzle<3, 4, 3> of the PTX ISA).
uint32_t Swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Element (mn, k) of the matrix that a descriptor names, by the canonical layouts of the PTX ISA for the
// 128-byte swizzle, T = 8 elements:
//   rows along the sum (K-major)     ((8, m), (T, 2k)) : ((8T, stride), (1, T))
//   rows across it (MN-major)        ((T, 8, m), (8, k)) : ((1, T, leading), (8T, stride))
uint16_t Element(uint64_t descriptor, bool across, uint32_t mn, uint32_t k) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) Stop("a matrix descriptor of another swizzle");
  const uint32_t leading = field(16), stride = field(32);
  const uint32_t at = across ? mn % 8 * 2 + mn / 8 % 8 * 16 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride
                             : mn % 8 * 128 + mn / 8 * stride + k % 8 * 2 + k / 8 * 16;
  const uint32_t address = Swizzled(field(0) + at);
  if (address + 2 > SharedBytes()) Stop("a matrix descriptor reaches beyond shared memory");
  uint16_t value;
  memcpy(&value, static_cast<unsigned char*>(Dynamic()) + address, 2);
  return value;
}
std::vector<uint16_t> Operand(uint64_t descriptor, bool across, int rows) {
  std::vector<uint16_t> values(rows * 16);
  for (int i = 0; i < rows * 16; ++i) values[i] = Element(descriptor, across, i / 16, i % 16);
  return values;
}
std::vector<float> Values(const std::vector<uint16_t>& bits) {
  std::vector<float> values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) values[i] = ToFloat(Bf16{bits[i]});
  return values;
}

bool Same(const Product& x, const Product& y) {
  return x.n == y.n && x.a == y.a && x.b == y.b && x.a_shared == y.a_shared && x.b_across == y.b_across &&
         x.accumulate == y.accumulate;
}

// A thread's part of a product. The first thread to come checks that the operands in shared memory are still
// those of the start: what changed them might as well have come before the hardware read them.
void Compute(Group& group, const Mine& mine) {
  Issued& issued = group.products[mine.number - group.first];
  const Product& product = issued.product;
  if (issued.b_values.empty()) {
    if (issued.b != Operand(product.b, product.b_across, product.n) ||
        (product.a_shared && issued.a != Operand(product.a, false, 64)))
      Stop("an operand in shared memory changed while a product was under way");
    issued.a_values = Values(issued.a);
    issued.b_values = Values(issued.b);
  }
  const int g = Lane() / 4, t = Lane() % 4, warp = Linear() % kGroupThreads / 32;
  float a[2][16];  // rows g and g + 8 of this warp
  if (product.a_shared) {
    for (int i = 0; i < 32; ++i)
      a[i / 16][i % 16] = issued.a_values[(16 * warp + g + i / 16 * 8) * 16 + i % 16];
  } else {  // the four lanes of a row have four of its 16 elements each
    const WarpValues& all = WarpExchange(0xffffffffu, mine.a, 16);
    for (int i = 0; i < 32; ++i) {
      const int half = i / 16, k = i % 16;
      uint16_t bits;
      memcpy(&bits, all.of[4 * g + k % 8 / 2] + 4 * (half + k / 8 * 2) + k % 2 * 2, 2);
      a[half][k] = ToFloat(Bf16{bits});
    }
  }
  for (int i = 0; i < product.n / 2; ++i) {
    const float* left = a[i % 4 / 2];
    const float* right = &issued.b_values[(i / 4 * 8 + 2 * t + i % 2) * 16];
    float sum = product.accumulate ? mine.d[i] : 0;
    for (int k = 0; k < 16; ++k) sum += left[k] * right[k];
    mine.d[i] = sum;
  }
  ++issued.done;
  while (!group.products.empty() && group.products.front().done == kGroupThreads) {
    group.products.pop_front();
    ++group.first;
  }
}

MBarrier& At(void* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) Stop("an mbarrier that nobody initialised");
  return found->second;
}
void NextPhase(MBarrier& barrier) {
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  Progress();
}

void CopyBox(unsigned char* to, const TensorMap& map, const BoxAt& at) {
  const uint32_t base = SharedOffset(to);
  for (uint32_t row = 0; row < map.box[2]; ++row)
    for (uint32_t column = 0; column < map.box[0]; ++column) {
      const int64_t index[4] = {at.of[0] + column, at.of[1], at.of[2] + row, at.of[3]};
      const unsigned char* from = map.data + index[0] * 2;
      bool inside = true;
      for (int i = 0; i < 4; ++i) {
        inside &= index[i] >= 0 && static_cast<uint64_t>(index[i]) < map.dims[i];
        if (i > 0) from += index[i] * static_cast<int64_t>(map.strides[i - 1]);
      }
      const uint32_t address = Swizzled(base + row * 128 + column * 2);
      unsigned char* const element = static_cast<unsigned char*>(Dynamic()) + address;
      if (inside)
        memcpy(element, from, 2);
      else
        memset(element, 0, 2);
    }
}

}  // namespace

uint32_t SharedOffset(const void* p) {
  const int64_t offset = static_cast<const unsigned char*>(p) - static_cast<unsigned char*>(Dynamic());
  if (offset < 0 || static_cast<size_t>(offset) >= SharedBytes())
    Stop("an address outside dynamic shared memory");
  return static_cast<uint32_t>(offset);
}

void MBarrierInit(void* barrier, uint32_t arrivals) {
  if (barriers.count(barrier)) Stop("an mbarrier is initialised twice");
  MBarrier& made = barriers[barrier];
  made.arrivals = made.missing = arrivals;
}

void MBarrierArrive(void* at, uint32_t expected_bytes) {
  MBarrier& barrier = At(at);
  if (barrier.missing == 0) Stop("more arrivals than an mbarrier counts");
  barrier.bytes += expected_bytes;
  Progress();
  if (--barrier.missing == 0 && barrier.bytes == 0) NextPhase(barrier);
}

// The phase's copies are made by the first thread that looks once all arrivals have come.
bool MBarrierTest(void* at, uint32_t parity) {
  MBarrier& barrier = At(at);
  if ((barrier.phase & 1) != parity) return true;
  if (barrier.missing) return false;
  for (const auto& [bytes, copy] : std::exchange(barrier.copies, {})) {
    copy();
    barrier.bytes -= bytes;
  }
  if (barrier.bytes) return false;
  NextPhase(barrier);
  return true;
}

void CopyBoxLater(void* to, const TensorMap& map, const BoxAt& at, void* barrier) {
  const size_t bytes = size_t{map.box[0]} * map.box[1] * map.box[2] * map.box[3] * 2;
  if (map.box[0] != 64 || map.box[1] != 1 || map.box[3] != 1) Stop("a box that is no panel of 128 bytes");
  if (SharedOffset(to) % 1024 || SharedOffset(to) + bytes > SharedBytes())
    Stop("a box that is unaligned or reaches beyond shared memory");
  memset(to, 0xff, bytes);  // from now on the bytes may come at any time: nobody may need the old ones
  At(barrier).copies.emplace_back(bytes, [=] { CopyBox(static_cast<unsigned char*>(to), map, at); });
}

void ProductIssue(const Product& product, float* d, const uint32_t* a) {
  Thread& thread = own[Linear()];
  Group& group = groups[Linear() / kGroupThreads];
  if (!thread.fenced) Stop("a product without wgmma.fence before it");
  const uint64_t number = thread.issued++;
  if (number == group.first + group.products.size()) {
    group.products.push_back({product, {}, Operand(product.b, product.b_across, product.n), {}, {}});
    if (product.a_shared) group.products.back().a = Operand(product.a, false, 64);
  } else if (!Same(group.products[number - group.first].product, product)) {
    Stop("the threads of a warpgroup issue different products");
  }
  thread.open.push_back({number, d, a});
}
void ProductFence() { own[Linear()].fenced = true; }
void ProductCommit() {
  Thread& thread = own[Linear()];
  thread.groups.push_back(std::exchange(thread.open, {}));
}
void ProductWait(int groups_left) {
  Thread& thread = own[Linear()];
  Progress();
  Wait();  // the others go on meanwhile, and may do what they should not
  while (thread.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Mine& mine : thread.groups.front()) Compute(groups[Linear() / kGroupThreads], mine);
    thread.groups.pop_front();
  }
  thread.fenced = false;  // what follows may touch the registers
}

void AsyncReset(int threads) {
  barriers.clear();
  groups.assign((threads + kGroupThreads - 1) / kGroupThreads, {});
  own.assign(threads, {});
}

const char* AsyncLeft() {
  for (const auto& [at, barrier] : barriers)
    if (!barrier.copies.empty()) return "a block ends while a copy into its shared memory is under way";
  for (const Thread& thread : own)
    if (!thread.open.empty() || !thread.groups.empty()) return "a block ends before its products are done";
  return nullptr;
}

}  // namespace emulator
