/* SPDX-License-Identifier: MIT */
/*
 * The names of the C library that libmshare takes over, when a program is linked
 * with it or runs with libmshare-preload.so.
 */
#undef _FILE_OFFSET_BITS /* it renames mmap to mmap64, and both names are meant here */
#include "internal.h"

#include <errno.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * syscall(MSHARE_SYSCALL, ...) and syscall(MSHARE_UNLINK_SYSCALL, ...); every
 * other number goes to the kernel.  Six arguments are always taken, as syscall(2)
 * itself does: the caller's registers have them, whatever they hold.
 */
MSHARE_EXPORT long syscall(long number, ...)
{
	long arguments[6], result;
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		arguments[i] = va_arg(list, long);
	va_end(list);

	if (number == MSHARE_SYSCALL)
		return mshare((const char *)arguments[0], (void *)arguments[1],
			      (size_t)arguments[2], (int)arguments[3], (mode_t)arguments[4]);
	if (number == MSHARE_UNLINK_SYSCALL)
		return mshare_unlink((const char *)arguments[0]);
	result = raw_syscall(number, arguments[0], arguments[1], arguments[2], arguments[3],
			     arguments[4], arguments[5]);
	if (result < 0 && result > -4096) {
		errno = (int)-result;
		return -1;
	}
	return result;
}

/*
 * The letter's donor maps 512 GiB of shared anonymous memory.  A kernel that
 * accounts for it up front (vm.overcommit_memory=0, the default) refuses that on
 * any machine with less memory, unless MAP_NORESERVE is given.  The pages are not
 * going to be of that mapping anyway once it is a region.  So a request that was
 * refused and that is aligned as a region must be is made again without
 * reservation; every other mmap() is as it was.
 */
static bool like_a_region(void *addr, size_t length, int flags)
{
	struct root root;
	size_t alignment = 0;
	int saved = errno;

	if ((flags & MAP_ANONYMOUS) && (flags & MAP_SHARED) && !(flags & MAP_NORESERVE) && addr &&
	    root_find(&root) == 0) {
		alignment = root_alignment(root.fd);
		root_close(&root);
	}
	errno = saved;
	return alignment != 0 && (((uintptr_t)addr | length) & (alignment - 1)) == 0;
}

MSHARE_EXPORT void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
{
	void *got;

	if (mshare_near(addr, length))
		return mshare_mmap(addr, length, prot, flags, fd, offset);
	got = raw_mmap(addr, length, prot, flags, fd, offset);
	if (got == MAP_FAILED && errno == ENOMEM && like_a_region(addr, length, flags))
		got = raw_mmap(addr, length, prot, flags | MAP_NORESERVE, fd, offset);
	return got;
}

/* off_t has 64 bits on the machines that syscall.c knows. */
MSHARE_EXPORT void *mmap64(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
	__attribute__((alias("mmap")));

/*
 * The rest of the family: in a region they act on the region (mapping.c), and
 * everywhere else they are the system call.
 */
MSHARE_EXPORT int munmap(void *addr, size_t length)
{
	return mshare_near(addr, length) ? mshare_munmap(addr, length) : raw_munmap(addr, length);
}

MSHARE_EXPORT int mprotect(void *addr, size_t length, int prot)
{
	return mshare_near(addr, length) ? mshare_mprotect(addr, length, prot) :
					   raw_mprotect(addr, length, prot);
}

MSHARE_EXPORT int msync(void *addr, size_t length, int flags)
{
	return mshare_near(addr, length) ? mshare_msync(addr, length, flags) :
					   raw_msync(addr, length, flags);
}

MSHARE_EXPORT int madvise(void *addr, size_t length, int advice)
{
	return mshare_near(addr, length) ? mshare_madvise(addr, length, advice) :
					   raw_madvise(addr, length, advice);
}

MSHARE_EXPORT void *mremap(void *addr, size_t old_size, size_t new_size, int flags, ...)
{
	void *target = NULL;
	va_list list;
	long result;

	if (flags & MREMAP_FIXED) {
		va_start(list, flags);
		target = va_arg(list, void *);
		va_end(list);
	}
	if (mshare_near(addr, old_size) || ((flags & MREMAP_FIXED) && mshare_near(target, new_size)))
		return mshare_mremap(addr, old_size, new_size, flags, target);
	result = raw_syscall(SYS_mremap, (long)addr, (long)old_size, (long)new_size, flags,
			     (long)target, 0);
	if (result < 0 && result > -4096) {
		errno = (int)-result;
		return MAP_FAILED;
	}
	return (void *)result;
}
