#include "core/mapped_file.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <mutex>
#include <tuple>

namespace {
// The open files of the process: whoever opens one again, even from another thread, shares its mapping. A
// file that was written meanwhile is another one.
using Identity = std::tuple<dev_t, ino_t, off_t, time_t, long>;
std::mutex g_mutex;
std::map<Identity, std::weak_ptr<MappedFile>> g_open;
}  // namespace

std::shared_ptr<MappedFile> MappedFile::Open(const std::string& path, std::string* error) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (fd < 0 || fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    *error = path + ": " + (fd >= 0 && errno == 0 ? "not a file" : strerror(errno));
    if (fd >= 0) close(fd);
    return nullptr;
  }
  const std::lock_guard<std::mutex> lock(g_mutex);
  const Identity identity{status.st_dev, status.st_ino, status.st_size, status.st_mtim.tv_sec,
                          status.st_mtim.tv_nsec};
  if (auto known = g_open[identity].lock()) {
    close(fd);
    return known;
  }
  const size_t size = static_cast<size_t>(status.st_size);
  void* data = size ? mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0) : nullptr;
  if (data == MAP_FAILED) {
    *error = path + ": " + strerror(errno);
    close(fd);
    return nullptr;
  }
  std::shared_ptr<MappedFile> file(new MappedFile(fd, static_cast<const char*>(data), size));
  for (auto entry = g_open.begin(); entry != g_open.end();)
    entry = entry->second.expired() ? g_open.erase(entry) : std::next(entry);
  g_open[identity] = file;
  return file;
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<char*>(data_), size_);
  close(fd_);
}

void MappedFile::Forget(size_t offset, size_t bytes) const {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t begin = (offset + page - 1) / page * page, end = (offset + bytes) / page * page;
  if (end > begin) madvise(const_cast<char*>(data_) + begin, end - begin, MADV_DONTNEED);
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
