#include "core/mapped_file.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

std::shared_ptr<MappedFile> MappedFile::Open(const std::string& path, std::string* error) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (fd < 0 || fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    *error = path + ": " + (fd >= 0 && errno == 0 ? "not a file" : strerror(errno));
    if (fd >= 0) close(fd);
    return nullptr;
  }
  const size_t size = static_cast<size_t>(status.st_size);
  void* data = size ? mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0) : nullptr;
  if (data == MAP_FAILED) {
    *error = path + ": " + strerror(errno);
    close(fd);
    return nullptr;
  }
  return std::shared_ptr<MappedFile>(new MappedFile(fd, static_cast<const char*>(data), size));
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<char*>(data_), size_);
  close(fd_);
}

bool MappedFile::Read(size_t offset, void* target, size_t bytes) const {
  char* to = static_cast<char*>(target);
  while (bytes > 0) {
    const ssize_t n = pread(fd_, to, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    to += n;
    offset += static_cast<size_t>(n);
    bytes -= static_cast<size_t>(n);
  }
  return true;
}
