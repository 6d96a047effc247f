// The kernels' C interface, driven without torch or Python so that sanitizers see nothing else.
//
// Each family of kernels has a file of checks here:
//
//     CHECK(rows_are_summed) {
//       Array<float> in(n), out(n);                                 // each to the byte, out poisoned
//       for (Device device : devices()) {
//         ...
//         REQUIRE(out[i] == expected, "row %d", i);
//       }
//     }
//
// Without arguments the program runs all checks, otherwise those named; `--isa` prints the instruction sets that this
// processor has.
// Linked with the .cu files and the emulator it also checks those, and compiled by nvcc it runs them on a GPU.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

namespace driver {

bool add(const char* name, void (*check)());

#define CHECK(name)                                              \
  static void name();                                            \
  static const bool name##_added = driver::add(#name, name);     \
  static void name()

#define REQUIRE(condition, ...)                                                    \
  do {                                                                             \
    if (!(condition)) {                                                            \
      fprintf(stderr, "%s:%d: " #condition " does not hold: ", __FILE__, __LINE__); \
      fprintf(stderr, __VA_ARGS__);                                                \
      fprintf(stderr, "\n");                                                       \
      abort();                                                                     \
    }                                                                              \
  } while (0)

enum class Device { cpu, cuda };
const std::vector<Device>& devices();            // that this program was linked for
const std::vector<Device>& devices(int number);  // for one of many cases: an emulated device, slow, gets every seventh
void finish(int status);               // of a launch on the CUDA device: waits for it

// Memory that all devices see, every byte 0xff: NaN in every format of numbers, -1 in integers.
void* allocate(size_t bytes);
void release(void* memory);

// As many bytes of address space, which take memory only where they are touched.
void* reserve(size_t bytes);
void unreserve(void* memory, size_t bytes);

template <typename T>
class Array {
 public:
  explicit Array(size_t size) : data_(static_cast<T*>(allocate(size * sizeof(T)))), size_(size) {}
  Array(size_t size, T value) : Array(size) {
    for (T& x : *this) x = value;
  }
  Array(const Array& other) : Array(other.size_) { memcpy(data_, other.data_, bytes()); }
  Array& operator=(const Array&) = delete;
  ~Array() { release(data_); }

  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void poison() { memset(data_, 0xff, bytes()); }
  bool same_bits(const Array& other) const { return memcmp(data_, other.data_, bytes()) == 0; }

 private:
  T* data_;
  size_t size_;
};

// Numbers that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  double uniform(double low, double high) { return low + (high - low) * double(bits() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

}  // namespace driver
