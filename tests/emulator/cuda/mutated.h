// The switches of the mutation check (mutations.py), a byte for each of its mutants, in the file
// that FASTATTN_MUTANTS names: 'm' and it is the one that runs. Of the others, those that could
// have run become 'r'.
#pragma once

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

namespace fastattn::cuda {

inline char* open_switches() {
  const char* const name = getenv("FASTATTN_MUTANTS");
  const int file = name == nullptr ? -1 : open(name, O_RDWR);
  struct stat about;
  if (file < 0 || fstat(file, &about) != 0) abort();
  void* const data = mmap(nullptr, static_cast<size_t>(about.st_size), PROT_READ | PROT_WRITE,
                          MAP_SHARED, file, 0);
  if (data == MAP_FAILED) abort();
  return static_cast<char*>(data);
}

// NOTE: opened by the first that asks, and so by each process that has been forked before.
inline bool mutated(int mutant) {
  static char* const switches = open_switches();
  if (switches[mutant] == 'm') return true;
  switches[mutant] = 'r';
  return false;
}

}  // namespace fastattn::cuda
