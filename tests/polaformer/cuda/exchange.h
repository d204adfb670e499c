// Files that the programs of the emulator exchange with conftest.py.
//
// Every tensor has its own buffer of its exact size, so that the address sanitizer detects accesses outside; outputs
// and workspaces are filled with NaN beforehand.
#pragma once

#include <cstdio>
#include <deque>
#include <fstream>

struct Request {
  std::ifstream file;
  std::deque<std::vector<char>> buffers;

  template <class T>
  T read() {
    T value;
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    if (!file) emulator::fail("the request ends early");
    return value;
  }
  char* read_bytes() {
    auto& buffer = buffers.emplace_back(read<int64_t>());
    file.read(buffer.data(), buffer.size());
    return buffer.data();
  }
  float* read_floats() { return reinterpret_cast<float*>(read_bytes()); }
  template <class T>
  T* make(int64_t elements, int64_t bytes = sizeof(T)) {
    return reinterpret_cast<T*>(buffers.emplace_back(elements * bytes, '\xff').data());
  }
};

struct Answer {
  std::ofstream file;
  void write(const void* data, int64_t bytes) { file.write(static_cast<const char*>(data), bytes); }
};

inline void check(const char* error) {
  if (error) emulator::fail(error);
}
