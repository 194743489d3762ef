// A FUSE file system that shows a folder of another one; it refuses or lies where rented volumes
// do.
//
//   passthrough --root=FOLDER MOUNTPOINT [-f] and any of
//
//   --refuse         renames with flags answer EINVAL
//   --lie            RENAME_EXCHANGE answers success, but is a plain rename: the target is lost
//   --noreplace-lie  RENAME_NOREPLACE replaces. The kernel itself refuses a target that exists when
//                    the call begins, so this shows only for one that another node makes during the
//                    call: --delay-ms gives it the time
//   --nodirect       opening with O_DIRECT answers EINVAL
//   --nofallocate    fallocate answers EOPNOTSUPP
//   --nofsyncdir     fsync of a folder answers EINVAL
//   --noflock        flock answers ENOSYS, as Lustre's does where it is mounted without
//   --delay-ms=N     each read, write, fsync and rename takes N ms longer

#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

static struct {
  char* root;
  int refuse, lie, noreplace_lie, nodirect, nofallocate, nofsyncdir, noflock;
  unsigned delay_ms;
} opt;
static int root_fd;

#define FLAG(text, field) {text, offsetof(__typeof__(opt), field), 1}
static const struct fuse_opt options[] = {
    FLAG("--root=%s", root),
    FLAG("--refuse", refuse),
    FLAG("--lie", lie),
    FLAG("--noreplace-lie", noreplace_lie),
    FLAG("--nodirect", nodirect),
    FLAG("--nofallocate", nofallocate),
    FLAG("--nofsyncdir", nofsyncdir),
    FLAG("--noflock", noflock),
    FLAG("--delay-ms=%u", delay_ms),
    FUSE_OPT_END,
};

// Every call below answers -errno, as libfuse wants it.
static int done(long result) { return result < 0 ? -errno : (int)result; }

static const char* below(const char* path) { return path[1] ? path + 1 : "."; }

static void delay(void) {
  struct timespec pause = {opt.delay_ms / 1000, (opt.delay_ms % 1000) * 1000000L};
  if (opt.delay_ms) nanosleep(&pause, NULL);
}

// The daemon is root: what it makes must belong to the caller.
static void give_to_caller(const char* path) {
  const struct fuse_context* caller = fuse_get_context();
  if (fchownat(root_fd, below(path), caller->uid, caller->gid, AT_SYMLINK_NOFOLLOW) < 0)
    perror("chown");
}

static void* pt_init(struct fuse_conn_info* conn, struct fuse_config* cfg) {
  (void)conn;
  cfg->use_ino = 1;
  cfg->hard_remove = 1;
  cfg->entry_timeout = cfg->attr_timeout = cfg->negative_timeout = 0;
  return NULL;
}

static int pt_getattr(const char* path, struct stat* st, struct fuse_file_info* fi) {
  return done(fi ? fstat((int)fi->fh, st) : fstatat(root_fd, below(path), st, AT_SYMLINK_NOFOLLOW));
}

static int pt_readlink(const char* path, char* buffer, size_t size) {
  ssize_t length = readlinkat(root_fd, below(path), buffer, size - 1);
  if (length < 0) return -errno;
  buffer[length] = 0;
  return 0;
}

static int pt_mkdir(const char* path, mode_t mode) {
  if (mkdirat(root_fd, below(path), mode) < 0) return -errno;
  give_to_caller(path);
  return 0;
}

static int pt_symlink(const char* target, const char* path) {
  if (symlinkat(target, root_fd, below(path)) < 0) return -errno;
  give_to_caller(path);
  return 0;
}

static int pt_unlink(const char* path) { return done(unlinkat(root_fd, below(path), 0)); }
static int pt_rmdir(const char* path) { return done(unlinkat(root_fd, below(path), AT_REMOVEDIR)); }

// What is lost goes to a folder beside the root, out of the mount's sight.
static int lose(const char* path) {
  static int number;
  char place[PATH_MAX];
  snprintf(place, sizeof place, "%s.lost", opt.root);
  mkdir(place, 0700);
  snprintf(place, sizeof place, "%s.lost/%d", opt.root,
           __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED));
  return done(renameat(root_fd, below(path), AT_FDCWD, place));
}

static int pt_rename(const char* from, const char* to, unsigned flags) {
  delay();
  if (flags && opt.refuse) return -EINVAL;
  if ((flags & RENAME_EXCHANGE) && opt.lie) {
    int lost = lose(to);
    return lost < 0 ? lost : done(renameat(root_fd, below(from), root_fd, below(to)));
  }
  if ((flags & RENAME_NOREPLACE) && opt.noreplace_lie) {
    lose(to);  // there may be nothing to lose
    return done(renameat(root_fd, below(from), root_fd, below(to)));
  }
  return done(renameat2(root_fd, below(from), root_fd, below(to), flags));
}

static int pt_link(const char* from, const char* to) {
  return done(linkat(root_fd, below(from), root_fd, below(to), 0));
}

static int pt_chmod(const char* path, mode_t mode, struct fuse_file_info* fi) {
  return done(fi ? fchmod((int)fi->fh, mode) : fchmodat(root_fd, below(path), mode, 0));
}

static int pt_chown(const char* path, uid_t uid, gid_t gid, struct fuse_file_info* fi) {
  return done(fi ? fchown((int)fi->fh, uid, gid)
                 : fchownat(root_fd, below(path), uid, gid, AT_SYMLINK_NOFOLLOW));
}

static int pt_utimens(const char* path, const struct timespec times[2], struct fuse_file_info* fi) {
  return done(fi ? futimens((int)fi->fh, times)
                 : utimensat(root_fd, below(path), times, AT_SYMLINK_NOFOLLOW));
}

static int pt_truncate(const char* path, off_t size, struct fuse_file_info* fi) {
  if (fi) return done(ftruncate((int)fi->fh, size));
  int fd = openat(root_fd, below(path), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  int result = done(ftruncate(fd, size));
  close(fd);
  return result;
}

static int open_file(const char* path, struct fuse_file_info* fi, int extra, mode_t mode) {
  if ((fi->flags & O_DIRECT) && opt.nodirect) return -EINVAL;
  // libfuse's buffers are not aligned as O_DIRECT demands, and it passes offsets even when
  // appending.
  int flags = (fi->flags & ~(O_DIRECT | O_APPEND)) | extra | O_CLOEXEC;
  int fd = openat(root_fd, below(path), flags, mode);
  if (fd < 0) return -errno;
  fi->fh = (uint64_t)fd;
  return 0;
}

static int pt_open(const char* path, struct fuse_file_info* fi) {
  return open_file(path, fi, 0, 0);
}

static int pt_create(const char* path, mode_t mode, struct fuse_file_info* fi) {
  int result = open_file(path, fi, O_CREAT, mode);
  if (result == 0) give_to_caller(path);
  return result;
}

static int pt_read(const char* path, char* buffer, size_t size, off_t offset,
                   struct fuse_file_info* fi) {
  (void)path;
  delay();
  return done(pread((int)fi->fh, buffer, size, offset));
}

static int pt_write(const char* path, const char* data, size_t size, off_t offset,
                    struct fuse_file_info* fi) {
  (void)path;
  delay();
  return done(pwrite((int)fi->fh, data, size, offset));
}

static int pt_fallocate(const char* path, int mode, off_t offset, off_t length,
                        struct fuse_file_info* fi) {
  (void)path;
  return opt.nofallocate ? -EOPNOTSUPP : done(fallocate((int)fi->fh, mode, offset, length));
}

static int pt_fsync(const char* path, int datasync, struct fuse_file_info* fi) {
  (void)path;
  delay();
  return done(datasync ? fdatasync((int)fi->fh) : fsync((int)fi->fh));
}

static int pt_release(const char* path, struct fuse_file_info* fi) {
  (void)path;
  close((int)fi->fh);
  return 0;
}

static int pt_opendir(const char* path, struct fuse_file_info* fi) {
  return open_file(path, fi, O_RDONLY | O_DIRECTORY, 0);
}

static int pt_readdir(const char* path, void* buffer, fuse_fill_dir_t fill, off_t offset,
                      struct fuse_file_info* fi, enum fuse_readdir_flags flags) {
  (void)path;
  (void)offset;
  (void)flags;
  int fd = openat((int)fi->fh, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* folder = fd < 0 ? NULL : fdopendir(fd);
  if (!folder) return -errno;
  for (struct dirent* entry; (entry = readdir(folder));) {
    struct stat st = {.st_ino = entry->d_ino, .st_mode = (mode_t)entry->d_type << 12};
    if (fill(buffer, entry->d_name, &st, 0, 0)) break;
  }
  closedir(folder);
  return 0;
}

static int pt_fsyncdir(const char* path, int datasync, struct fuse_file_info* fi) {
  return opt.nofsyncdir ? -EINVAL : pt_fsync(path, datasync, fi);
}

static int pt_flock(const char* path, struct fuse_file_info* fi, int operation) {
  (void)path;
  (void)fi;
  (void)operation;
  return -ENOSYS;
}

static int pt_statfs(const char* path, struct statvfs* st) {
  (void)path;
  return done(fstatvfs(root_fd, st));
}

static struct fuse_operations operations = {
    .init = pt_init,
    .getattr = pt_getattr,
    .readlink = pt_readlink,
    .mkdir = pt_mkdir,
    .symlink = pt_symlink,
    .unlink = pt_unlink,
    .rmdir = pt_rmdir,
    .rename = pt_rename,
    .link = pt_link,
    .chmod = pt_chmod,
    .chown = pt_chown,
    .utimens = pt_utimens,
    .truncate = pt_truncate,
    .open = pt_open,
    .create = pt_create,
    .read = pt_read,
    .write = pt_write,
    .fallocate = pt_fallocate,
    .fsync = pt_fsync,
    .release = pt_release,
    .opendir = pt_opendir,
    .readdir = pt_readdir,
    .releasedir = pt_release,
    .fsyncdir = pt_fsyncdir,
    .statfs = pt_statfs,
};

int main(int argc, char** argv) {
  struct fuse_args args = FUSE_ARGS_INIT(argc, argv);
  if (fuse_opt_parse(&args, &opt, options, NULL) < 0 || !opt.root) {
    fprintf(stderr, "usage: %s --root=FOLDER MOUNTPOINT [options]\n", argv[0]);
    return 2;
  }
  root_fd = open(opt.root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (root_fd < 0) {
    perror(opt.root);
    return 1;
  }
  if (opt.noflock) operations.flock = pt_flock;  // without one the kernel keeps locks itself
  umask(0);
  return fuse_main(args.argc, args.argv, &operations, NULL);
}
