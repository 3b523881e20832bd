/* Preloaded: reads of files whose path matches DVT_READS_FAIL ("pattern:errno:first") end with that error, from the
 * first-th read on. The kernel's own answer to a dying disk, for whoever reads: Python, Pillow, HDF5, safetensors. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fnmatch.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_int count;

static int fails(int fd)
{
    const char *wanted = getenv("DVT_READS_FAIL");
    if (wanted == NULL)
        return 0;
    char pattern[256], link[64], path[4096];
    int number, first;
    if (sscanf(wanted, "%255[^:]:%d:%d", pattern, &number, &first) != 3)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (fnmatch(pattern, path, 0) != 0 || atomic_fetch_add(&count, 1) + 1 < first)
        return 0;
    errno = number;
    return 1;
}

ssize_t read(int fd, void *buffer, size_t size)
{
    static ssize_t (*real)(int, void *, size_t);
    if (real == NULL)
        real = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    return fails(fd) ? -1 : real(fd, buffer, size);
}

ssize_t pread(int fd, void *buffer, size_t size, off_t at)
{
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (real == NULL)
        real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    return fails(fd) ? -1 : real(fd, buffer, size, at);
}

ssize_t pread64(int fd, void *buffer, size_t size, off64_t at)
{
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (real == NULL)
        real = (ssize_t (*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    return fails(fd) ? -1 : real(fd, buffer, size, at);
}
