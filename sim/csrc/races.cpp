// Who read and wrote each range of memory last, and whether an event orders the next access.
//
// Each stream has a vector clock. An access is ordered behind another one if the clock of its
// stream has reached the other's tick: through events, or through the host, which has waited for
// the one before it submitted the other. The answer does not depend on what ran when.
#include "core.h"

#include <cstring>
#include <set>

namespace sim {

std::string text(Range range) {
  char out[64];
  std::snprintf(out, sizeof out, "[0x%zx, %zu bytes]", size_t(range.begin),
                size_t(range.end - range.begin));
  return out;
}

namespace races {
namespace {

struct Access {
  Stream* stream = nullptr;
  uint64_t tick = 0;
  std::string what;
};
struct Cell {
  uintptr_t end = 0;
  Access write;
  std::vector<Access> reads;  // since then, one a stream
};

std::map<uintptr_t, Cell>& cells() {
  static auto* all = new std::map<uintptr_t, Cell>();
  return *all;
}
Clock& host() {
  static auto* clock = new Clock();
  return *clock;
}
std::mutex& found_mutex() {
  static auto* made = new std::mutex();
  return *made;
}
std::vector<std::string>& found_list() {
  static auto* all = new std::vector<std::string>();
  return *all;
}

constexpr size_t kMost = 100;

bool before(const Access& access, const Clock& clock) {
  if (access.stream == nullptr) return true;
  const size_t number = access.stream->number;
  return number < clock.size() && clock[number] >= access.tick;
}

void split(uintptr_t at) {
  auto& all = cells();
  auto next = all.upper_bound(at);
  if (next == all.begin()) return;
  auto cell = std::prev(next);
  if (cell->first == at || cell->second.end <= at) return;
  Cell behind = cell->second;
  cell->second.end = at;
  all.emplace(at, std::move(behind));
}

std::string told(const Command& command, const char* did, Stream& stream) {
  std::string out = command.name + " " + did + " on " + stream.name();
  if (!command.where.empty()) out += " at " + command.where;
  return out;
}

void check(const Access& earlier, const Access& now, const Clock& clock, Range range) {
  if (before(earlier, clock)) return;
  report("no event orders " + earlier.what + " and " + now.what + ": memory " + text(range));
}

void read(Stream& stream, const Command& command, Range range) {
  split(range.begin);
  split(range.end);
  auto& all = cells();
  const Access now{&stream, stream.clock[stream.number], told(command, "reads", stream)};
  uintptr_t at = range.begin;
  auto cell = all.lower_bound(range.begin);
  while (at < range.end) {
    if (cell == all.end() || cell->first > at) {
      const uintptr_t end = cell == all.end() ? range.end : std::min(cell->first, range.end);
      all[at] = Cell{end, {}, {now}};
      at = end;
      continue;
    }
    check(cell->second.write, now, stream.clock, {cell->first, cell->second.end});
    auto& reads = cell->second.reads;
    const auto same = std::find_if(reads.begin(), reads.end(),
                                   [&](const Access& each) { return each.stream == &stream; });
    if (same == reads.end())
      reads.push_back(now);
    else
      *same = now;
    at = cell->second.end;
    ++cell;
  }
}

void write(Stream& stream, const Command& command, Range range) {
  split(range.begin);
  split(range.end);
  auto& all = cells();
  const Access now{&stream, stream.clock[stream.number], told(command, "writes", stream)};
  auto cell = all.lower_bound(range.begin);
  while (cell != all.end() && cell->first < range.end) {
    const Range part{cell->first, cell->second.end};
    // A read that follows the write speaks for it.
    check(cell->second.write, now, stream.clock, part);
    for (const Access& each : cell->second.reads) check(each, now, stream.clock, part);
    cell = all.erase(cell);
  }
  all[range.begin] = Cell{range.end, now, {}};
}

}  // namespace

void report(std::string what) {
  std::lock_guard<std::mutex> guard(found_mutex());
  auto& all = found_list();
  if (all.size() >= kMost) return;
  // The same two places are told once, whatever the memory.
  const auto told_before = what.substr(0, what.find(": memory "));
  for (const auto& each : all)
    if (each.compare(0, told_before.size(), told_before) == 0) return;
  all.push_back(std::move(what));
}

std::vector<std::string> found(bool clear) {
  std::lock_guard<std::mutex> guard(found_mutex());
  auto all = found_list();
  if (clear) found_list().clear();
  return all;
}

uint64_t checksum(Range range) {
  uint64_t sum = 14695981039346656037ull;
  const auto* at = reinterpret_cast<const unsigned char*>(range.begin);
  const auto* end = reinterpret_cast<const unsigned char*>(range.end);
  for (; at + 8 <= end; at += 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    sum = (sum ^ word) * 1099511628211ull;
    sum ^= sum >> 29;
  }
  for (; at < end; ++at) sum = (sum ^ *at) * 1099511628211ull;
  return sum;
}

bool quiet(Range range) {
  auto& all = cells();
  auto cell = all.upper_bound(range.begin);
  if (cell != all.begin() && std::prev(cell)->second.end > range.begin) --cell;
  for (; cell != all.end() && cell->first < range.end; ++cell) {
    if (!before(cell->second.write, host())) return false;
    for (const Access& each : cell->second.reads)
      if (!before(each, host())) return false;
  }
  return true;
}

void stamp(Stream& stream, const Command& command, std::optional<uint64_t>& content) {
  join(stream.clock, host());
  if (stream.clock.size() <= stream.number) stream.clock.resize(stream.number + 1);
  ++stream.clock[stream.number];
  if (command.reads_host && quiet(command.reads.back()))
    content = checksum(command.reads.back());
  for (const Range& each : command.reads)
    if (each.end > each.begin) read(stream, command, each);
  for (const Range& each : command.writes)
    if (each.end > each.begin) write(stream, command, each);
}

void host_saw(const Clock& clock) { join(host(), clock); }
const Clock& host_clock() { return host(); }

void forget(Range range) {
  split(range.begin);
  split(range.end);
  auto& all = cells();
  all.erase(all.lower_bound(range.begin), all.lower_bound(range.end));
}

void forget_all() { cells().clear(); }

}  // namespace races
}  // namespace sim
