/* Preloaded: below the folder DVT_ONE_CASE, names are kept in small letters, as old file systems do it: whatever is
 * asked for in capitals is the same file. The headers that declare these functions are left out on purpose: their
 * prototypes differ between releases, and what is handed on is only pointers and numbers. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

typedef const char *text;

static text folded(text path, char *buffer)
{
    text folder = getenv("DVT_ONE_CASE");
    size_t start = folder == NULL ? 0 : strlen(folder), length = path == NULL ? 0 : strlen(path);
    if (start == 0 || length <= start || length >= 4096 || strncmp(path, folder, start) != 0 || path[start] != '/')
        return path;
    for (size_t i = 0; i <= length; i++)
        buffer[i] = i < start ? path[i] : (char)tolower((unsigned char)path[i]);
    return buffer;
}

#define REAL(kind, name, parameters) \
    static kind(*real) parameters; \
    if (real == NULL) \
        real = (kind(*) parameters)dlsym(RTLD_NEXT, name); \
    char one[4096], two[4096]; \
    (void)two;

#define PLAIN(name) int name(text path) { REAL(int, #name, (text)) return real(folded(path, one)); }
#define AND_A(name, type) int name(text path, type a) { REAL(int, #name, (text, type)) return real(folded(path, one), a); }
#define AT_A(name, type) \
    int name(int at, text path, type a) { REAL(int, #name, (int, text, type)) return real(at, folded(path, one), a); }
#define AT_A_B(name, first, second) \
    int name(int at, text path, first a, second b) \
    { \
        REAL(int, #name, (int, text, first, second)) \
        return real(at, folded(path, one), a, b); \
    }
#define PAIR(name) \
    int name(text from, text to) { REAL(int, #name, (text, text)) return real(folded(from, one), folded(to, two)); }
#define AT_PAIR(name) \
    int name(int a, text from, int b, text to) \
    { \
        REAL(int, #name, (int, text, int, text)) \
        return real(a, folded(from, one), b, folded(to, two)); \
    }
#define OPEN(name) \
    int name(text path, int flags, ...) \
    { \
        REAL(int, #name, (text, int, ...)) \
        va_list rest; \
        va_start(rest, flags); \
        int mode = va_arg(rest, int); \
        va_end(rest); \
        return real(folded(path, one), flags, mode); \
    }
#define OPEN_AT(name) \
    int name(int at, text path, int flags, ...) \
    { \
        REAL(int, #name, (int, text, int, ...)) \
        va_list rest; \
        va_start(rest, flags); \
        int mode = va_arg(rest, int); \
        va_end(rest); \
        return real(at, folded(path, one), flags, mode); \
    }

OPEN(open) OPEN(open64) OPEN_AT(openat) OPEN_AT(openat64)
AND_A(stat, void *) AND_A(stat64, void *) AND_A(lstat, void *) AND_A(lstat64, void *)
AT_A_B(fstatat, void *, int) AT_A_B(fstatat64, void *, int)
PLAIN(unlink) PLAIN(rmdir) PLAIN(chdir) AND_A(access, int) AND_A(mkdir, unsigned) AND_A(chmod, unsigned)
AT_A(unlinkat, int) AT_A(mkdirat, unsigned) AT_A_B(faccessat, int, int) AT_A_B(fchmodat, unsigned, int)
AT_A_B(utimensat, void *, int) PAIR(rename) PAIR(link) AT_PAIR(renameat)

/* What programs that were linked with earlier C libraries call for stat and lstat. */
AT_A(__xstat, void *) AT_A(__xstat64, void *) AT_A(__lxstat, void *) AT_A(__lxstat64, void *)

void *opendir(text path)
{
    REAL(void *, "opendir", (text))
    return real(folded(path, one));
}

int statx(int at, text path, int flags, unsigned mask, void *found)
{
    REAL(int, "statx", (int, text, int, unsigned, void *))
    return real(at, folded(path, one), flags, mask, found);
}

long readlink(text path, char *to, size_t size)
{
    REAL(long, "readlink", (text, char *, size_t))
    return real(folded(path, one), to, size);
}

void *fopen64(text path, text mode)
{
    REAL(void *, "fopen64", (text, text))
    return real(folded(path, one), mode);
}

void *fopen(text path, text mode)
{
    REAL(void *, "fopen", (text, text))
    return real(folded(path, one), mode);
}
