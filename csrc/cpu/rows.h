// Rows grouped by class, and the fixed blocks of rows that are the items of parallel work.
#pragma once

#include <cstdint>

namespace cem_fast {

// Positions [begin(c), end(c)) hold the rows of class c in their natural order; after the last class come the rows
// whose label is out of range.
class RowsByClass {
 public:
  // `positions` [rows], where given, takes every row's.
  RowsByClass(const int64_t* labels, int64_t rows, int64_t classes, int64_t* positions = nullptr);
  ~RowsByClass();
  RowsByClass(const RowsByClass&) = delete;
  RowsByClass& operator=(const RowsByClass&) = delete;

  int64_t row(int64_t position) const { return order_ == nullptr ? position : order_[position]; }
  int64_t begin(int64_t c) const { return offsets_[c]; }
  int64_t end(int64_t c) const { return offsets_[c + 1]; }
  int64_t classes() const { return classes_; }
  int64_t valid_rows() const { return offsets_[classes_]; }
  int64_t rows() const { return rows_; }

 private:
  int64_t classes_;
  int64_t rows_;
  int64_t* offsets_;  // [classes + 2]: the ends of the classes and of the rows out of range, after a zero
  int32_t* order_;    // [rows], null where the order is the natural one
};

struct RowBlock {
  int64_t class_index;
  int64_t begin;  // positions
  int64_t end;
  int64_t slot;  // of the block's partial sums; -1 for the first block of a class, which adds up in place
};

// Every class with rows cut into blocks of `size` rows: a function of the labels alone, whatever the number of threads.
class RowBlocks {
 public:
  RowBlocks(const RowsByClass& groups, int64_t size);
  ~RowBlocks();
  RowBlocks(const RowBlocks&) = delete;
  RowBlocks& operator=(const RowBlocks&) = delete;

  int64_t count() const { return first_[classes_]; }
  int64_t first(int64_t c) const { return first_[c]; }  // the blocks of class c are [first(c), first(c + 1))
  int64_t slots() const { return slots_; }
  const RowBlock& operator[](int64_t i) const { return blocks_[i]; }

 private:
  int64_t classes_;
  int64_t slots_;
  int64_t* first_;  // [classes + 1]
  RowBlock* blocks_;
};

}  // namespace cem_fast
