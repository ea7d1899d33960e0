// A file mapped read-only, shared by every tensor that points into it.
#pragma once
#include <cstddef>
#include <memory>
#include <string>

class MappedFile {
 public:
  // nullptr with a reason when the file cannot be opened or mapped. Shared with whoever has the same file
  // open.
  static std::shared_ptr<MappedFile> Open(const std::string& path, std::string* error);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* data() const { return data_; }
  size_t size() const { return size_; }
  // Reads through the descriptor: a file that shrank gives an error instead of a signal.
  bool Read(size_t offset, void* target, size_t bytes) const;
  // Takes these bytes out of the process's memory until they are looked at again.
  void Forget(size_t offset, size_t bytes) const;

 private:
  MappedFile(int fd, const char* data, size_t size) : fd_(fd), data_(data), size_(size) {}
  int fd_;
  const char* data_;
  size_t size_;
};
