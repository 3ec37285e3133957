// Kernels are hidden from the dynamic linker, so dladdr knows their file alone: the name comes from
// the file's own table of symbols.
#include "kernel_name.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <iterator>
#include <vector>

namespace fastattn::emulator {
namespace {

using Bytes = std::vector<char>;

Bytes read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

template <typename T>
const T* table_at(const Bytes& file, size_t offset) {
  return reinterpret_cast<const T*>(file.data() + offset);
}

// The function that starts at `address` of an ELF file, or "".
std::string symbol_at(const Bytes& file, uintptr_t base, uintptr_t address) {
  if (file.size() < sizeof(ElfW(Ehdr)) || memcmp(file.data(), ELFMAG, SELFMAG) != 0) return "";
  const auto& header = *table_at<ElfW(Ehdr)>(file, 0);
  if (header.e_type == ET_DYN) address -= base;
  const auto* sections = table_at<ElfW(Shdr)>(file, header.e_shoff);
  for (size_t s = 0; s < header.e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = table_at<ElfW(Sym)>(file, sections[s].sh_offset);
    const size_t names = sections[sections[s].sh_link].sh_offset;
    for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
      if (ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC && symbols[i].st_value == address) {
        return table_at<char>(file, names + symbols[i].st_name);
      }
    }
  }
  return "";
}

void remove_all(std::string& text, const std::string& part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
}

// "void fastattn::cuda::kernel<int>(fastattn::Params)" as "kernel<int>".
std::string shortened(std::string name) {
  remove_all(name, "(anonymous namespace)::");
  remove_all(name, "fastattn::cuda::");
  remove_all(name, "fastattn::");
  if (name.starts_with("void ")) name.erase(0, 5);
  int depth = 0;
  for (size_t i = name.size(); name.ends_with(')') && i-- > 0;) {
    depth += (name[i] == ')') - (name[i] == '(');
    if (depth == 0) name.erase(i);
  }
  return name;
}

}  // namespace

std::string kernel_name(const void* kernel) {
  Dl_info info = {};
  if (dladdr(kernel, &info) == 0) return "kernel";
  const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  const auto address = reinterpret_cast<uintptr_t>(kernel);
  const std::string symbol = symbol_at(read_file(info.dli_fname), base, address);
  if (symbol.empty()) {
    char text[32];
    snprintf(text, sizeof(text), "+0x%zx", static_cast<size_t>(address - base));
    return info.dli_fname + std::string(text);
  }
  char* const plain = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, nullptr);
  const std::string name = plain == nullptr ? symbol : shortened(plain);
  free(plain);
  return name;
}

}  // namespace fastattn::emulator
