/* Makes writing fail, as a full or a read-only disk does: for LD_PRELOAD, see tests/full_disk.py.

   Calls that write below a folder are counted, over all processes; from number `first` on all of them fail with
   `error`. A full disk still lets files be removed; a read-only one does not. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long first = 0, *count; /* the latter is shared with forked children */
static int error = 0;
static char folder[PATH_MAX] = "";

__attribute__((constructor)) static void begin(void) {
    count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* 0 for `number` only counts. */
void fail_from(const char *where, long number, int with) {
    snprintf(folder, sizeof folder, "%s", where);
    first = number, error = with, *count = 0;
}

long calls(void) { return *count; }

static int fails(void) { return ++*count >= first && first > 0 && (errno = error, 1); }
static int fixed(void) { return error == EROFS && first > 0 && *count >= first && (errno = EROFS, 1); }

static int inside(int fd) {
    char link[64], path[PATH_MAX];
    if (!*folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    return length > 0 && (path[length] = 0, !strncmp(path, folder, strlen(folder)));
}

static int below(const char *path) {
    char here[PATH_MAX], whole[2 * PATH_MAX];
    if (!*folder) return 0;
    if (*path == '/') return !strncmp(path, folder, strlen(folder));
    if (!getcwd(here, sizeof here)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", here, path);
    return !strncmp(whole, folder, strlen(folder));
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    return inside(fd) && fails() ? -1 : REAL(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    return inside(fd) && fails() ? -1 : REAL(writev)(fd, parts, number);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return inside(fd) && fails() ? -1 : REAL(pwrite64)(fd, data, size, at);
}
int fsync(int fd) { return inside(fd) && fails() ? -1 : REAL(fsync)(fd); }
int ftruncate64(int fd, off64_t size) { return inside(fd) && fails() ? -1 : REAL(ftruncate64)(fd, size); }
int rename(const char *from, const char *to) { return below(to) && fails() ? -1 : REAL(rename)(from, to); }
int link(const char *from, const char *to) { return below(to) && fails() ? -1 : REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    return below(to) && fails() ? -1 : REAL(linkat)(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) { return below(path) && fails() ? -1 : REAL(mkdir)(path, mode); }

int unlink(const char *path) { return below(path) && fixed() ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return below(path) && fixed() ? -1 : REAL(rmdir)(path); }
int unlinkat(int at, const char *path, int flags) {
    return (at == AT_FDCWD ? below(path) : inside(at)) && fixed() ? -1 : REAL(unlinkat)(at, path, flags);
}

static int opens(const char *name, const char *path, int flags, mode_t mode) {
    int writes = (flags & O_ACCMODE) != O_RDONLY;
    if (writes && below(path) && fails()) return -1;
    return ((int (*)(const char *, int, mode_t))dlsym(RTLD_NEXT, name))(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return opens("open", path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return opens("open64", path, flags, mode);
}
