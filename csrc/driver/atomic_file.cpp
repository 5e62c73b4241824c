#include "driver/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

namespace miniquant::driver {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(int error, std::string_view action, const fs::path& path) {
  throw std::system_error(error, std::generic_category(), std::string(action) + " " + path.string());
}

class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  [[nodiscard]] int get() const { return value_; }
  [[nodiscard]] int close() { return ::close(std::exchange(value_, -1)); }

 private:
  int value_;
};

// An unused, hidden name in the folder of `target`, so a listing shows finished files only.
fs::path sibling(const fs::path& target, std::string_view kind, int attempt) {
  std::string name = target.filename().string();
  name.insert(0, 1, '.');
  name.append(".").append(std::to_string(::getpid())).append(".").append(std::to_string(attempt));
  name.append(".").append(kind);
  return target.parent_path() / name;
}

constexpr int kMaxAttempts = 1000;

// A file on its way to its target. The destructor undoes unfinished steps.
class PendingFile {
 public:
  PendingFile(fs::path target, std::string_view text) : target_(std::move(target)) {
    if (fs::is_directory(target_)) fail(EISDIR, "cannot replace", target_);
    Descriptor file = create();
    try {
      write(file, text);
    } catch (...) {
      remove(temporary_);
      throw;
    }
  }
  PendingFile(PendingFile&& other) noexcept
      : target_(std::move(other.target_)),
        temporary_(std::exchange(other.temporary_, {})),
        backup_(std::exchange(other.backup_, {})),
        is_new_(other.is_new_),
        renamed_(std::exchange(other.renamed_, false)) {}
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;
  PendingFile& operator=(PendingFile&&) = delete;

  ~PendingFile() {
    remove(temporary_);
    if (!backup_.empty()) {
      std::error_code ignored;
      fs::rename(backup_, target_, ignored);
      // rename() between two names of the same file leaves both.
      remove(backup_);
    } else if (renamed_ && is_new_) {
      remove(target_);
    }
  }

  void rename() {
    keep_backup();
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail(errno, "cannot write", target_);
    temporary_.clear();
    renamed_ = true;
  }

  void finish() noexcept {
    remove(backup_);
    backup_.clear();
    renamed_ = false;
  }

 private:
  static void remove(const fs::path& path) noexcept {
    std::error_code ignored;
    if (!path.empty()) fs::remove(path, ignored);
  }

  Descriptor create() {
    for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
      temporary_ = sibling(target_, "tmp", attempt);
      Descriptor file(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
      if (file.get() >= 0) return file;
      if (errno != EEXIST) break;
    }
    const int error = errno;
    temporary_.clear();
    fail(error, "cannot write", target_);
  }

  void write(Descriptor& file, std::string_view text) const {
    while (!text.empty()) {
      const ssize_t written = ::write(file.get(), text.data(), text.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail(errno, "cannot write", target_);
      text.remove_prefix(static_cast<std::size_t>(written));
    }
    if (::fsync(file.get()) != 0) fail(errno, "cannot write", target_);
    if (file.close() != 0) fail(errno, "cannot write", target_);
  }

  void keep_backup() {
    for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
      const fs::path name = sibling(target_, "old", attempt);
      if (::link(target_.c_str(), name.c_str()) == 0) {
        backup_ = name;
        return;
      }
      if (errno == ENOENT) {
        is_new_ = true;
        return;
      }
      if (errno != EEXIST) break;
    }
    // A file system without hard links: the rename alone is still atomic for this file.
    if (errno != EPERM && errno != EOPNOTSUPP && errno != ENOSYS) fail(errno, "cannot replace", target_);
  }

  fs::path target_;
  fs::path temporary_;
  fs::path backup_;
  bool is_new_ = false;
  bool renamed_ = false;
};

}  // namespace

void write_files(const std::vector<OutputFile>& files) {
  std::set<fs::path> folders;
  for (const OutputFile& file : files) folders.insert(file.path.has_parent_path() ? file.path.parent_path() : ".");
  for (const fs::path& folder : folders) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error) fail(error.value(), "cannot make the folder", folder);
  }

  std::vector<PendingFile> pending;
  pending.reserve(files.size());
  for (const OutputFile& file : files) pending.emplace_back(file.path, file.text);
  for (PendingFile& file : pending) file.rename();
  for (PendingFile& file : pending) file.finish();

  // Names are on disk once their folders are flushed. The files are complete by now, so a failure here undoes nothing.
  for (const fs::path& folder : folders) {
    const Descriptor directory(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (directory.get() >= 0) ::fsync(directory.get());
  }
}

}  // namespace miniquant::driver
