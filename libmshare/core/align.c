/* SPDX-License-Identifier: MIT */
/*
 * libmshare-align.so: large shared memory of a program that nobody will change lies where
 * huge pages fit, so that its page tables can be had back (mshare(1), run and collapse).
 *
 * Nothing else about it changes: it is the memory that the program asked for, the kernel's own,
 * and lives, forks and ends as it would.  Only the address is chosen, and only where the program
 * leaves that to the kernel.  It is a hint: whatever goes wrong, the program has what it would
 * have had.
 *
 * With MSHARE_RUN_BACKING=hugetlb anonymous shared memory is of huge pages of the pool instead,
 * if all of it is free.  Then lengths are rounded up where the kernel insists.
 */
#undef _FILE_OFFSET_BITS /* it renames mmap to mmap64, and both names are meant here */

#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MAP_32BIT
#define MAP_32BIT 0
#endif
#define EXPORT __attribute__((visibility("default")))
#define HUGE ((size_t)2 << 20)
#define SLOT ((size_t)1 << 30) /* what one page of PMD entries maps: those are shared as a whole */
#define USUAL ((size_t)64 << 20)
#define MOST 64

typedef void *mmap_function(void *, size_t, int, int, int, off_t);
typedef int munmap_function(void *, size_t);
typedef int mprotect_function(void *, size_t, int);
typedef void *shmat_function(int, const void *, int);

static mmap_function *next_mmap;
static munmap_function *next_munmap;
static mprotect_function *next_mprotect;
static shmat_function *next_shmat;
static size_t smallest = SIZE_MAX; /* until we are set up, nothing is large */
static bool hugetlb;

/*
 * Memory of the pool: what the program asked for, and what is mapped for that.  Without a lock,
 * which a child might inherit: an entry is there when it has a start, and being made before.
 */
static struct huge {
	_Atomic(char *) start;
	size_t length, mapped;
} huge[MOST];
static char being_made;

static size_t up(size_t value, size_t unit)
{
	return (value + unit - 1) / unit * unit;
}

/* Who comes after us may be another preload library; before we know it, it is the kernel. */
static void *plain_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
{
	if (next_mmap)
		return next_mmap(addr, length, prot, flags, fd, offset);
	return (void *)syscall(SYS_mmap, addr, length, prot, flags, fd, offset);
}

static int plain_munmap(void *addr, size_t length)
{
	return next_munmap ? next_munmap(addr, length) :
			     (int)syscall(SYS_munmap, addr, length);
}

static int plain_mprotect(void *addr, size_t length, int prot)
{
	return next_mprotect ? next_mprotect(addr, length, prot) :
			       (int)syscall(SYS_mprotect, addr, length, prot);
}

__attribute__((constructor)) static void set_up(void)
{
	const char *size = secure_getenv("MSHARE_RUN_MIN_SIZE");
	const char *backing = secure_getenv("MSHARE_RUN_BACKING");
	size_t wanted = USUAL;

	if (size) {
		char *end;
		unsigned long long value = strtoull(size, &end, 10);

		if (end != size && !*end && value)
			wanted = value;
	}
	next_mmap = (mmap_function *)dlsym(RTLD_NEXT, "mmap");
	next_munmap = (munmap_function *)dlsym(RTLD_NEXT, "munmap");
	next_mprotect = (mprotect_function *)dlsym(RTLD_NEXT, "mprotect");
	next_shmat = (shmat_function *)dlsym(RTLD_NEXT, "shmat");
	hugetlb = backing && !strcmp(backing, "hugetlb");
	smallest = wanted;
}

/* A free place that is `offset` behind a multiple of `unit`; NULL: the kernel's choice. */
static void *place(size_t length, size_t unit, uintptr_t offset)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, saved = errno;
	uintptr_t found;
	long got;

	if (length > SIZE_MAX - 2 * unit)
		return NULL;
	got = syscall(SYS_mmap, NULL, length + unit, PROT_NONE, flags, -1, 0);
	errno = saved;
	if (got == -1)
		return NULL;
	syscall(SYS_munmap, got, length + unit);
	found = (uintptr_t)got;
	return (void *)(found + (offset - found) % unit);
}

/* An entry to be made; NULL: there are too many. */
static struct huge *new_entry(void)
{
	for (int i = 0; i < MOST; i++) {
		char *none = NULL;

		if (atomic_compare_exchange_strong(&huge[i].start, &none, &being_made))
			return &huge[i];
	}
	return NULL;
}

static void no_huge_pages(size_t length)
{
	dprintf(STDERR_FILENO,
		"mshare run: %zu huge pages are needed and not free (vm.nr_hugepages), so these %zu MiB "
		"are of small pages\n",
		up(length, HUGE) / HUGE, up(length, (size_t)1 << 20) >> 20);
}

/*
 * Anonymous shared memory of the pool's pages; MAP_FAILED: not to be had.  All of it is
 * reserved, by a mapping of its size: the reservation is the file's and stays with it.  What is
 * mapped then is rounded up to slots, because the kernel shares page tables of those that a
 * mapping has as a whole (huge_pmd_share(), mm/hugetlb.c); behind the file's end is nothing.
 */
static void *of_huge_pages(size_t length, int prot)
{
	size_t file = up(length, HUGE), mapped = file < SLOT ? file : up(length, SLOT);
	void *got = MAP_FAILED, *reserving;
	struct huge *entry = new_entry();
	int fd;

	if (!entry)
		return MAP_FAILED;
	fd = memfd_create("mshare-run", MFD_CLOEXEC | MFD_HUGETLB | (21 << MAP_HUGE_SHIFT));
	if (fd >= 0 && ftruncate(fd, (off_t)file) == 0) {
		reserving = plain_mmap(NULL, file, prot, MAP_SHARED, fd, 0);
		if (reserving != MAP_FAILED) {
			void *hint = place(mapped, file < SLOT ? HUGE : SLOT, 0);

			plain_munmap(reserving, file);
			got = plain_mmap(hint, mapped, prot, MAP_SHARED | MAP_NORESERVE, fd, 0);
		}
	}
	if (fd >= 0)
		close(fd);
	entry->length = length;
	entry->mapped = mapped;
	atomic_store(&entry->start, got == MAP_FAILED ? NULL : got);
	return got;
}

EXPORT void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
{
	int type = flags & MAP_TYPE, saved = errno;

	if (addr || length < smallest || length > SIZE_MAX / 2 || (type != MAP_SHARED && type != MAP_SHARED_VALIDATE) ||
	    (flags & (MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_32BIT | MAP_HUGETLB)))
		return plain_mmap(addr, length, prot, flags, fd, offset);
	if (hugetlb && (flags & MAP_ANONYMOUS)) {
		void *got = of_huge_pages(length, prot);

		if (got != MAP_FAILED) {
			errno = saved;
			return got;
		}
		no_huge_pages(length);
		errno = saved;
	}
	/* The offset of anonymous memory is nothing, whatever was given. */
	addr = place(length, HUGE, flags & MAP_ANONYMOUS ? 0 : (uintptr_t)offset);
	return plain_mmap(addr, length, prot, flags, fd, offset);
}

/* off_t has 64 bits on the machines that msharefs is for. */
EXPORT void *mmap64(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
	__attribute__((alias("mmap")));

EXPORT void *shmat(int id, const void *addr, int flags)
{
	int saved = errno;
	struct shmid_ds about;

	if (!next_shmat) {
		errno = ENOSYS;
		return (void *)-1;
	}
	if (!addr && shmctl(id, IPC_STAT, &about) == 0 && about.shm_segsz >= smallest) {
		void *hint = place(about.shm_segsz, HUGE, 0);
		void *got = hint ? next_shmat(id, hint, flags) : (void *)-1;

		if (got != (void *)-1)
			return got;
	}
	errno = saved;
	return next_shmat(id, addr, flags);
}

/*
 * In memory of the pool, lengths are of huge pages: what the program knows as its own length is
 * rounded up, all of it to all that is mapped.
 */
static size_t rounded(char *addr, size_t length, bool forget)
{
	for (int i = 0; i < MOST; i++) {
		struct huge *each = &huge[i];
		char *start = atomic_load(&each->start);

		if (!start || start == &being_made || addr < start || addr >= start + each->mapped)
			continue;
		if (length > each->mapped)
			return length;
		if (addr == start && length >= each->length) {
			length = each->mapped;
			if (forget)
				atomic_store(&each->start, NULL);
		}
		return up(length, HUGE);
	}
	return length;
}

EXPORT int munmap(void *addr, size_t length)
{
	return plain_munmap(addr, hugetlb ? rounded(addr, length, true) : length);
}

EXPORT int mprotect(void *addr, size_t length, int prot)
{
	return plain_mprotect(addr, hugetlb ? rounded(addr, length, false) : length, prot);
}
