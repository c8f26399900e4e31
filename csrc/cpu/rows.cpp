#include "rows.h"

namespace cem_fast {

namespace {

int64_t class_of(int64_t label, int64_t classes) {
  return static_cast<uint64_t>(label) < static_cast<uint64_t>(classes) ? label : classes;
}

}  // namespace

// A stable counting sort.
RowsByClass::RowsByClass(const int64_t* labels, int64_t rows, int64_t classes, int64_t* positions)
    : classes_(classes), rows_(rows), offsets_(new int64_t[classes + 2]()), order_(nullptr) {
  int64_t* next = offsets_ + 1;  // while sorting: where the next row of class c goes
  if (labels == nullptr) {
    next[0] = rows;
  } else {
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t c = class_of(labels[n], classes);
      if (c < classes) ++next[c];
    }
  }
  if (classes == 1 && next[0] == rows) {
    if (positions != nullptr) {
      for (int64_t n = 0; n < rows; ++n) positions[n] = n;
    }
    return;
  }
  int64_t start = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const int64_t size = next[c];
    next[c] = start;
    start += size;
  }
  next[classes] = start;
  order_ = new int32_t[rows];
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t position = next[class_of(labels[n], classes)]++;
    order_[position] = static_cast<int32_t>(n);
    if (positions != nullptr) positions[n] = position;
  }
}

RowsByClass::~RowsByClass() {
  delete[] offsets_;
  delete[] order_;
}

RowBlocks::RowBlocks(const RowsByClass& groups, int64_t size)
    : classes_(groups.classes()), slots_(0), first_(new int64_t[classes_ + 1]) {
  first_[0] = 0;
  for (int64_t c = 0; c < classes_; ++c)
    first_[c + 1] = first_[c] + (groups.end(c) - groups.begin(c) + size - 1) / size;
  blocks_ = new RowBlock[first_[classes_]];
  for (int64_t c = 0; c < classes_; ++c) {
    int64_t begin = groups.begin(c);
    for (int64_t b = first_[c]; b < first_[c + 1]; ++b, begin += size) {
      const int64_t end = groups.end(c) - begin < size ? groups.end(c) : begin + size;
      blocks_[b] = {c, begin, end, b == first_[c] ? -1 : slots_++};
    }
  }
}

RowBlocks::~RowBlocks() {
  delete[] first_;
  delete[] blocks_;
}

}  // namespace cem_fast
