/* SPDX-License-Identifier: MIT */
/*
 * System calls made directly.
 *
 * The library interposes mmap() and syscall(), so its own calls must not go
 * through those names; and after fork nothing may take a lock of the C library.
 */
#include "internal.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
long raw_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
long raw_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc 0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	return x0;
}
#else
#error "libmshare knows the system call instruction of x86_64 and aarch64 only"
#endif

static long checked(long result)
{
	if (result < 0 && result > -4096) {
		errno = (int)-result;
		return -1;
	}
	return result;
}

void *raw_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
{
	return (void *)checked(raw_syscall(SYS_mmap, (long)addr, (long)length, prot, flags, fd,
					   offset));
}

int raw_munmap(void *addr, size_t length)
{
	return (int)checked(raw_syscall(SYS_munmap, (long)addr, (long)length, 0, 0, 0, 0));
}

int raw_mprotect(void *addr, size_t length, int prot)
{
	return (int)checked(raw_syscall(SYS_mprotect, (long)addr, (long)length, prot, 0, 0, 0));
}

/* Move a mapping to an address, in place of whatever is there. */
int raw_mremap(void *from, size_t length, void *to)
{
	long moved = checked(raw_syscall(SYS_mremap, (long)from, (long)length, (long)length,
					 MREMAP_MAYMOVE | MREMAP_FIXED, (long)to, 0));

	return moved == -1 ? -1 : 0;
}

int raw_msync(void *addr, size_t length, int flags)
{
	return (int)checked(raw_syscall(SYS_msync, (long)addr, (long)length, flags, 0, 0, 0));
}

int raw_madvise(void *addr, size_t length, int advice)
{
	return (int)checked(raw_syscall(SYS_madvise, (long)addr, (long)length, advice, 0, 0, 0));
}

/* snprintf() is not async-signal-safe. */
static char *append_number(char *end, unsigned number)
{
	if (number >= 10)
		end = append_number(end, number / 10);
	*end++ = (char)('0' + number % 10);
	*end = '\0';
	return end;
}

void path_of(int fd, char path[FD_PATH_MAX])
{
	static const char directory[] = "/proc/thread-self/fd/";

	memcpy(path, directory, sizeof directory);
	append_number(path + sizeof directory - 1, (unsigned)fd);
}

void close_keeping_errno(int fd)
{
	int saved = errno;

	if (fd >= 0)
		close(fd);
	errno = saved;
}
