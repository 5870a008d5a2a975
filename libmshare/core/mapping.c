/* SPDX-License-Identifier: MIT */
/*
 * mmap() and its kin where they touch a region: there they act on the region, for
 * every sharer at once; elsewhere they are the system calls of their names.
 *
 * A range that lies partly in a region is split.  What is not mapped elsewhere is found
 * out first; then come the region's parts: they can fail for reasons of their own (a
 * daemon that has died), and then nothing has been done.  A mapping cannot be split, so
 * mmap() refuses (EINVAL).
 */
#include "internal.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* What mmap() takes in a region; most of it changes nothing there. */
#define KNOWN_FLAGS                                                                                \
	(MAP_TYPE | MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_ANONYMOUS | MAP_NORESERVE |              \
	 MAP_POPULATE | MAP_NONBLOCK | MAP_LOCKED | MAP_STACK | MAP_DENYWRITE | MAP_EXECUTABLE)

struct part {
	char *start;
	size_t length;
	struct attachment *in; /* NULL: no region */
};

static size_t page_mask(void)
{
	return (size_t)sysconf(_SC_PAGESIZE) - 1;
}

/* Checks and rounds as the kernel does. */
static int check_range(char *start, size_t *length)
{
	size_t mask = page_mask();
	size_t rounded = (*length + mask) & ~mask;

	if (((uintptr_t)start & mask) || rounded < *length ||
	    (uintptr_t)start + rounded < (uintptr_t)start) {
		errno = EINVAL;
		return -1;
	}
	*length = rounded;
	return 0;
}

/*
 * The part of [*at, end) that begins at *at; moves *at behind it.  Whose region it is in is to
 * be given back.
 */
static struct part next_part(char **at, char *end)
{
	struct part part = { .start = *at };
	char *until;

	attachment_lock();
	part.in = attachment_take(attachment_at(*at));
	until = part.in ? part.in->start + part.in->size : attachment_above(*at);
	attachment_unlock();
	if (!until || until > end)
		until = end;
	part.length = (size_t)(until - *at);
	*at = until;
	return part;
}

static void part_done(const struct part *part)
{
	if (part->in)
		attachment_give_back(part->in);
}

static int call(struct attachment *in, uint16_t op, struct mshare_wire_object *object, int fd)
{
	struct mshare_wire_request request = { .op = op, .object_count = 1 };
	struct mshare_wire_reply reply;
	int result, ignored;

	if (attachment_enter(in) < 0)
		return -1;
	in->waiting = (struct waiting){ 0 };
	result = attachment_call(in, &request, object, &fd, fd >= 0, &reply, &ignored);
	attachment_leave(in);
	return result;
}

static int call_part(const struct part *part, uint16_t op, int prot)
{
	struct mshare_wire_object object = {
		.offset = (uint64_t)(part->start - part->in->start),
		.length = part->length,
		.prot = (uint32_t)prot,
	};

	return call(part->in, op, &object, -1);
}

/* A parameter of the loop below: `argument` is prot, flags or advice. */
typedef int (*in_region)(const struct part *part, int argument);
typedef int (*elsewhere)(void *addr, size_t length, int argument);

static int unmap_elsewhere(void *addr, size_t length, int argument)
{
	(void)argument;
	return raw_munmap(addr, length);
}

/* msync(MS_ASYNC) does nothing in Linux but to say ENOMEM where nothing is mapped. */
static int check_mapped(void *addr, size_t length)
{
	return raw_msync(addr, length, MS_ASYNC);
}

enum step { CHECK, INSIDE, OUTSIDE };

static int on_part(const struct part *part, enum step step, int argument, in_region inside,
		   elsewhere outside)
{
	if (step == INSIDE)
		return part->in ? inside(part, argument) : 0;
	if (part->in)
		return 0;
	if (step == OUTSIDE)
		return outside(part->start, part->length, argument);
	return outside == unmap_elsewhere ? 0 : check_mapped(part->start, part->length);
}

static int on_each_part(char *start, size_t length, int argument, in_region inside,
			elsewhere outside)
{
	char *end = start + length;
	int result = 0;

	reason_forget();
	for (enum step step = CHECK; result == 0 && step <= OUTSIDE; step++) {
		for (char *at = start; result == 0 && at < end;) {
			struct part part = next_part(&at, end);

			result = on_part(&part, step, argument, inside, outside);
			part_done(&part);
		}
	}
	return result;
}

/* ---- mmap ---- */

/*
 * The daemon reads and writes a mapped file by its descriptor, at any offset and of any
 * length.  By the program's own it cannot where that was opened to append (pwrite(2) then
 * appends) or to bypass the page cache; and whether it could open the file itself, only
 * the program's rights tell.  So such a file is opened once more, here, and -1 says that
 * the program's descriptor will do, or has to: mmap(2) takes it as well.
 */
static int open_plainly(int fd)
{
	int flags = fcntl(fd, F_GETFL), saved = errno, opened;
	char path[FD_PATH_MAX];
	struct stat status;

	/* Opening anything but a regular file may wait, or do something. */
	if (flags < 0 || (flags & O_PATH) || !(flags & (O_APPEND | O_DIRECT)) ||
	    fstat(fd, &status) < 0 || !S_ISREG(status.st_mode))
		return -1;
	path_of(fd, path);
	opened = open(path, (flags & (O_ACCMODE | O_SYNC | O_NOATIME)) | O_CLOEXEC);
	if (opened < 0)
		errno = saved;
	return opened;
}

static void *map_in(struct attachment *in, char *start, size_t length, int prot, int flags, int fd,
		    off_t offset)
{
	int type = flags & MAP_TYPE;
	struct mshare_wire_object object = {
		.offset = (uint64_t)(start - in->start),
		.length = length,
		.file_offset = flags & MAP_ANONYMOUS ? 0 : (uint64_t)offset,
		.prot = (uint32_t)prot & (PROT_READ | PROT_WRITE | PROT_EXEC),
		.flags = (uint32_t)(type == MAP_PRIVATE ? MAP_PRIVATE : MAP_SHARED) |
			 ((uint32_t)flags & (MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE)),
	};

	int plain, result;

	if (flags & MAP_FIXED_NOREPLACE)
		object.flags &= ~(uint32_t)MAP_FIXED;
	if (flags & MAP_ANONYMOUS)
		return call(in, MSHARE_WIRE_MMAP, &object, -1) < 0 ? MAP_FAILED : start;
	if (fd < 0) {
		errno = EBADF;
		return MAP_FAILED;
	}
	plain = open_plainly(fd);
	result = call(in, MSHARE_WIRE_MMAP, &object, plain < 0 ? fd : plain);
	close_keeping_errno(plain);
	return result < 0 ? MAP_FAILED : start;
}

static int check_flags(size_t length, int flags, off_t offset)
{
	int type = flags & MAP_TYPE;

	if (length == 0 ||
	    (type != MAP_SHARED && type != MAP_PRIVATE && type != MAP_SHARED_VALIDATE) ||
	    (!(flags & MAP_ANONYMOUS) && ((uint64_t)offset & page_mask())))
		errno = EINVAL;
	else if (flags & ~KNOWN_FLAGS)
		errno = type == MAP_SHARED_VALIDATE ? EOPNOTSUPP : EINVAL;
	else
		return 0;
	return -1;
}

/*
 * An address without MAP_FIXED is a wish.  The kernel grants it if nothing is mapped
 * there; so does the region, and otherwise the kernel chooses, outside.
 */
MSHARE_EXPORT void *mshare_mmap(void *addr, size_t length, int prot, int flags, int fd,
				off_t offset)
{
	char *start = addr, *at = addr, *got = MAP_FAILED;
	bool wish = !(flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)), here = false;
	size_t rounded = length;
	struct part first;

	if (!mshare_near(addr, length) || length == 0 || check_range(start, &rounded) < 0)
		return raw_mmap(addr, length, prot, flags, fd, offset);
	reason_forget();
	first = next_part(&at, start + rounded);
	if (first.in && at == start + rounded) {
		here = true;
		if (check_flags(length, flags, offset) == 0)
			got = map_in(first.in, start, rounded, prot, flags, fd, offset);
	} else if ((first.in || at != start + rounded) && !wish) {
		here = true;
		errno = flags & MAP_FIXED_NOREPLACE ? EEXIST : EINVAL;
	}
	part_done(&first);
	if (!here || (wish && got == MAP_FAILED && errno == EEXIST))
		return raw_mmap(addr, length, prot, flags, fd, offset);
	if (got != MAP_FAILED && (flags & MAP_POPULATE) && !(flags & MAP_NONBLOCK)) {
		int saved = errno;

		/* As with mmap(2), that it cannot be populated is no failure. */
		mshare_populate(got, rounded,
				prot & PROT_WRITE ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
		errno = saved;
	}
	return got;
}

/* ---- munmap ---- */

static int unmap_part(const struct part *part, int argument)
{
	(void)argument;
	return call_part(part, MSHARE_WIRE_MUNMAP, 0);
}

MSHARE_EXPORT int mshare_munmap(void *addr, size_t length)
{
	size_t rounded = length;

	if (length == 0 || check_range(addr, &rounded) < 0) {
		errno = EINVAL;
		return -1;
	}
	return on_each_part(addr, rounded, 0, unmap_part, unmap_elsewhere);
}

/* ---- mprotect ---- */

static int protect_part(const struct part *part, int prot)
{
	return call_part(part, MSHARE_WIRE_MPROTECT, prot);
}

MSHARE_EXPORT int mshare_mprotect(void *addr, size_t length, int prot)
{
	size_t rounded = length;

	if (check_range(addr, &rounded) < 0)
		return -1;
	return on_each_part(addr, rounded, prot, protect_part, raw_mprotect);
}

/* ---- msync ---- */

static int sync_part(const struct part *part, int flags)
{
	/* Pages are on their way anyway: MS_ASYNC has nothing to do, as in Linux. */
	return flags & MS_SYNC ? call_part(part, MSHARE_WIRE_MSYNC, 0) : 0;
}

MSHARE_EXPORT int mshare_msync(void *addr, size_t length, int flags)
{
	size_t rounded = length;

	if ((flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC)) ||
	    ((flags & MS_ASYNC) && (flags & MS_SYNC))) {
		errno = EINVAL;
		return -1;
	}
	if (check_range(addr, &rounded) < 0)
		return -1;
	return on_each_part(addr, rounded, flags, sync_part, raw_msync);
}

/* ---- madvise ---- */

/*
 * Advice about the window would split it or worse: MADV_DOFORK would hand a child a
 * window without its userfaultfd.  What only hints is left alone.  What is not to be dumped
 * may be a secret.
 */
static int advise_part(const struct part *part, int advice)
{
	switch (advice) {
	case MADV_NORMAL:
	case MADV_RANDOM:
	case MADV_SEQUENTIAL:
	case MADV_WILLNEED:
	case MADV_FREE: /* the kernel may free it, or not */
	case MADV_DONTFORK:
	case MADV_MERGEABLE:
	case MADV_UNMERGEABLE:
	case MADV_HUGEPAGE:
	case MADV_NOHUGEPAGE:
	case MADV_COLD:
	case MADV_PAGEOUT:
	case MADV_COLLAPSE:
		return 0;
	case MADV_DONTDUMP:
	case MADV_DODUMP:
		return window_dump(part->in, part->start, part->length, advice);
	case MADV_DONTNEED:
		return call_part(part, MSHARE_WIRE_DISCARD, 0);
	case MADV_POPULATE_READ:
	case MADV_POPULATE_WRITE:
		return mshare_populate(part->start, part->length, advice);
	default:
		errno = EINVAL;
		return -1;
	}
}

MSHARE_EXPORT int mshare_madvise(void *addr, size_t length, int advice)
{
	size_t rounded = length;

	if (check_range(addr, &rounded) < 0)
		return -1;
	return on_each_part(addr, rounded, advice, advise_part, raw_madvise);
}

/* ---- mremap ---- */

/*
 * Shrinking is munmap() of the tail.  A region does not grow or move an object
 * (ENOMEM: callers of realloc(3) kind have a way to go on), and nothing moves into
 * or out of one: that would be a window without a guard.
 */
MSHARE_EXPORT void *mshare_mremap(void *old, size_t old_size, size_t new_size, int flags,
				  void *target)
{
	size_t from = old_size, to = new_size;

	if (check_range(old, &from) < 0 || check_range(NULL, &to) < 0 || to == 0 || from == 0 ||
	    (flags & ~MREMAP_MAYMOVE)) {
		errno = EINVAL;
		return MAP_FAILED;
	}
	(void)target;
	if (to > from) {
		errno = ENOMEM;
		return MAP_FAILED;
	}
	if (to < from && mshare_munmap((char *)old + to, from - to) < 0)
		return MAP_FAILED;
	return old;
}
