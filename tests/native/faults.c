/* Stands in front of libc (LD_PRELOAD) and makes the nth matching call fail: gcc -O2 -shared -fPIC
 * faults.c -o faults.so
 *
 * From the environment: FAULT=function:nth[+]:action, FAULT_PATH=substring of the file's path (""
 * any), FAULT_LOG=file that gets a line at each hit. From the process itself: fault_arm(),
 * fault_hits(), fault_calls(). nth counts from 1 over all threads; "+" means from there on. action:
 * an errno number | short | lie | flip | kill. short  half of the bytes are moved        lie claims
 * to have done it, and does nothing flip   does it, and flips a bit of what was read        kill
 * SIGKILL before the call
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, SHORT = -1, LIE = -2, FLIP = -3, KILL = -4 };

static char function[32], wanted_path[256], log_path[256];
static int nth, sticky, action;
static atomic_int calls, hits;

static int parse_action(const char* text) {
  if (!strcmp(text, "short")) return SHORT;
  if (!strcmp(text, "lie")) return LIE;
  if (!strcmp(text, "flip")) return FLIP;
  if (!strcmp(text, "kill")) return KILL;
  return atoi(text);
}

void fault_arm(const char* name, int at, int and_after, const char* what, const char* path) {
  action = 0; /* disarmed while it changes */
  snprintf(function, sizeof function, "%s", name);
  snprintf(wanted_path, sizeof wanted_path, "%s", path);
  nth = at;
  sticky = and_after;
  calls = 0;
  hits = 0;
  action = parse_action(what);
}
int fault_hits(void) { return hits; }
int fault_calls(void) { return calls; }

__attribute__((constructor)) static void from_environment(void) {
  const char *fault = getenv("FAULT"), *path = getenv("FAULT_PATH"), *log = getenv("FAULT_LOG");
  char name[32], what[16], number[16];
  if (log) snprintf(log_path, sizeof log_path, "%s", log);
  if (fault && sscanf(fault, "%31[^:]:%15[^:]:%15s", name, number, what) == 3) {
    fault_arm(name, atoi(number), strchr(number, '+') != NULL, what, path ? path : "");
  }
}

static int path_matches(int fd, const char* path) {
  char link[32], target[4096];
  if (!*wanted_path) return 1;
  if (path && strstr(path, wanted_path)) return 1;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, target, sizeof target - 1);
  if (length < 0) return 0;
  target[length] = 0;
  return strstr(target, wanted_path) != NULL;
}

/* What to do with this call: 0 let it pass. */
static int strike(const char* name, int fd, const char* path) {
  if (!action || strcmp(name, function)) return 0;
  int saved = errno;
  int matches = path_matches(fd, path);
  errno = saved;
  if (!matches) return 0;
  int number = atomic_fetch_add(&calls, 1) + 1;
  if (sticky ? number < nth : number != nth) return 0;
  atomic_fetch_add(&hits, 1);
  if (*log_path) {
    int log = (int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    dprintf(log, "%s %d\n", name, number);
    syscall(SYS_close, log);
  }
  if (action == KILL) kill(getpid(), SIGKILL);
  if (action > 0) errno = action;
  return action;
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void* real(const char* name) { return dlsym(RTLD_NEXT, name); }

ssize_t pread64(int fd, void* to, size_t bytes, off64_t offset) {
  static ssize_t (*next)(int, void*, size_t, off64_t);
  if (!next) next = REAL(pread64);
  int what = strike("pread64", fd, NULL);
  if (what > 0) return -1;
  if (what == SHORT && bytes > 1) bytes = (bytes + 1) / 2;
  ssize_t got = next(fd, to, bytes, offset);
  if (what == FLIP && got > 0) ((char*)to)[got / 2] ^= 4;
  return got;
}
ssize_t pwrite64(int fd, const void* from, size_t bytes, off64_t offset) {
  static ssize_t (*next)(int, const void*, size_t, off64_t);
  if (!next) next = REAL(pwrite64);
  int what = strike("pwrite64", fd, NULL);
  if (what > 0) return -1;
  if (what == LIE) return (ssize_t)bytes;
  if (what == SHORT && bytes > 1) bytes = (bytes + 1) / 2;
  return next(fd, from, bytes, offset);
}

#define WRAP(name, fd, path, declaration, arguments) \
  int name declaration {                             \
    static int(*next) declaration;                   \
    if (!next) next = REAL(name);                    \
    int what = strike(#name, fd, path);              \
    if (what > 0) return -1;                         \
    if (what == LIE) return 0;                       \
    return next arguments;                           \
  }
WRAP(fsync, fd, NULL, (int fd), (fd))
WRAP(syncfs, fd, NULL, (int fd), (fd))
WRAP(fstat, fd, NULL, (int fd, struct stat* to), (fd, to))
WRAP(fallocate64, fd, NULL, (int fd, int mode, off64_t at, off64_t bytes), (fd, mode, at, bytes))
WRAP(ftruncate64, fd, NULL, (int fd, off64_t bytes), (fd, bytes))
WRAP(futimens, fd, NULL, (int fd, const struct timespec times[2]), (fd, times))
WRAP(mkdirat, fd, path, (int fd, const char* path, mode_t mode), (fd, path, mode))
WRAP(unlinkat, fd, path, (int fd, const char* path, int flags), (fd, path, flags))
WRAP(sync_file_range, fd, NULL, (int fd, off64_t at, off64_t bytes, unsigned flags),
     (fd, at, bytes, flags))
WRAP(renameat2, fd, from, (int fd, const char* from, int to_fd, const char* to, unsigned flags),
     (fd, from, to_fd, to, flags))
WRAP(rename, -1, from, (const char* from, const char* to), (from, to))

int close(int fd) {
  static int (*next)(int);
  if (!next) next = REAL(close);
  int what = strike("close", fd, NULL);
  if (what > 0) { /* as Linux does: the descriptor is gone all the same */
    next(fd);
    errno = what;
    return -1;
  }
  return next(fd);
}
int openat64(int fd, const char* path, int flags, ...) {
  static int (*next)(int, const char*, int, ...);
  if (!next) next = (int (*)(int, const char*, int, ...))real("openat64");
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return strike("openat64", fd, path) > 0 ? -1 : next(fd, path, flags, mode);
}
int ioctl(int fd, unsigned long request, ...) {
  static int (*next)(int, unsigned long, ...);
  if (!next) next = (int (*)(int, unsigned long, ...))real("ioctl");
  va_list rest;
  va_start(rest, request);
  void* argument = va_arg(rest, void*);
  va_end(rest);
  return strike("ioctl", fd, NULL) > 0 ? -1 : next(fd, request, argument);
}
long syscall(long number, ...) { /* openat2 has no wrapper of its own in libc */
  static long (*next)(long, ...);
  if (!next) next = (long (*)(long, ...))real("syscall");
  va_list rest;
  va_start(rest, number);
  long a[6];
  for (int i = 0; i < 6; ++i) a[i] = va_arg(rest, long);
  va_end(rest);
  if (number == SYS_openat2 && strike("openat2", (int)a[0], (const char*)a[1]) > 0) return -1;
  if (number == 451 && strike("cachestat", (int)a[0], NULL) > 0) return -1;
  return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
