/* SPDX-License-Identifier: MIT */
/*
 * mshare.h - regions of memory that many processes map at one address.
 *
 * The interface is that of the mshare() patches for Linux (v1, April 2022); see
 * mshare(3).  A daemon, msharefsd(8), must have msharefs mounted.
 *
 * Every function returns 0, or -1 with errno set, and may be called from any
 * thread.  Sizes and addresses are in bytes.
 */
#ifndef MSHARE_H
#define MSHARE_H

#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * The numbers with which syscall(2) reaches mshare() and mshare_unlink() in a
 * program that is linked with libmshare or runs with its preload library.  The
 * numbers of the patches (451, 452) belong to other system calls today; no
 * kernel has these.
 */
#define MSHARE_SYSCALL 0x2d730001L
#define MSHARE_UNLINK_SYSCALL 0x2d730002L

/* What a read of a region's file gives. */
struct mshare_info {
	unsigned long start; /* the region's first address */
	unsigned long size;  /* bytes */
};

/*
 * Create (O_CREAT, O_EXCL) or attach the region NAME at [addr, addr + length).
 *
 * oflags is O_RDONLY or O_RDWR, with O_CREAT and O_EXCL; mode is the mode of a
 * new region's file.  Anonymous memory that a creating process has mapped in the
 * range becomes the region's, contents kept.
 *
 * ENOENT  msharefs is not mounted, or no such region and no O_CREAT
 * EINVAL  addr or length not a multiple of the alignment, or not the region's
 *         own; the process has something mapped there; bad oflags or name
 * EEXIST  O_CREAT | O_EXCL, and the region exists
 * EACCES  the file's mode denies it
 * EPERM   the region was created O_RDONLY and O_RDWR is asked; the name is
 *         reserved; this process may not have a userfaultfd; or msharefs is mounted
 *         by another user only, see mshare_root()
 * ENAMETOOLONG, ENOMEM, ENOSPC, EMFILE, ENFILE as usual
 * EOPNOTSUPP  a mapping in the range cannot become the region's
 * ENOTCONN, ECONNREFUSED  the daemon has died
 * EPROTO  library and daemon are of different versions
 */
int mshare(const char *name, void *addr, size_t length, int oflags, mode_t mode);

/*
 * The same, with a choice of what holds a new region's pages: "shm", POSIX shared
 * memory; "hugetlb", huge pages that the administrator has reserved, whose page tables
 * the sharers really share; or NULL: what $MSHARE_BACKING says, as with mshare(), else
 * the daemon's default.  What exists already is attached as it is.
 *
 * EINVAL  no such backing; addr or length not a multiple of the huge page
 * ENOMEM  not enough huge pages; the daemon's log tells how many are needed
 * EPERM   huge pages are for root and the group of vm.hugetlb_shm_group
 * EOPNOTSUPP  the daemon cannot have huge pages
 */
int mshare_backed(const char *name, void *addr, size_t length, int oflags, mode_t mode,
		  const char *backing);

/*
 * End this process's use of a region: its window is unmapped.  By the last
 * sharer, or by a process that is not attached, also remove the name, as
 * unlink(2) does; the memory is freed when the last sharer is gone.
 *
 * ENOENT  no such region
 * EACCES, EPERM  a process that is not attached may not remove the name
 */
int mshare_unlink(const char *name);

/*
 * Attach the region NAME where it lies, which *info then tells; info may be NULL.
 * oflags is O_RDONLY or O_RDWR.  Errors are those of mshare().
 */
int mshare_attach(const char *name, int oflags, struct mshare_info *info);

/*
 * End this process's use of a region and leave the name: what the end of a
 * process does.  ENOENT if this process has not attached the region.
 */
int mshare_detach(const char *name);

/*
 * Where a region lies.  ENOENT also if it has no range yet.
 */
int mshare_stat(const char *name, struct mshare_info *info);

/*
 * Where msharefs is mounted: MSHARE_ROOT, else /sys/fs/mshare, else the first mount of
 * type fuse.msharefs.  path is an array of size bytes; PATH_MAX is enough.
 *
 * The daemon of a mount is given this process's memory to fill, so mounts of users other
 * than root and the one this process runs as are passed over.  A set-user-ID
 * program, or one with file capabilities, takes /sys/fs/mshare, of root's, and no other.
 *
 * ENOENT    msharefs is not mounted, or MSHARE_ROOT is no msharefs
 * EPERM     it is mounted, by another user
 * ENOTCONN  it is, and its daemon has died (the daemon is not asked: a call may find
 *           that out that this one did not)
 * ERANGE    the path does not fit
 */
int mshare_root(char *path, size_t size);

/*
 * mmap(2), munmap(2), mprotect(2), msync(2), madvise(2) and mremap(2) that act on a
 * region where they touch one that this process has attached: for every sharer at
 * once.  Elsewhere they are the system calls of their names.  In a program that is
 * linked with libmshare or runs with its preload library, the plain names do the
 * same.
 *
 * In a region
 *   - mmap() takes MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS and regular files.  With an
 *     address and no MAP_FIXED it maps there if it is a hole;
 *   - madvise(MADV_DONTNEED) makes private memory start fresh; advice that only
 *     hints is ignored;
 *   - mremap() shrinks, and does nothing else.
 *
 * Besides the errors of the system calls:
 * EACCES  the region is attached read-only
 * EINVAL  a fixed mapping lies partly in a region
 * EPERM   PROT_EXEC
 * ENODEV  the file is not a regular file
 * EOPNOTSUPP  the kernel cannot protect it (before Linux 5.19)
 * ENOTCONN, EPIPE  the daemon has died
 */
void *mshare_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset);
int mshare_munmap(void *addr, size_t length);
int mshare_mprotect(void *addr, size_t length, int prot);
int mshare_msync(void *addr, size_t length, int flags);
int mshare_madvise(void *addr, size_t length, int advice);
void *mshare_mremap(void *addr, size_t old_size, size_t new_size, int flags, void *target);

/*
 * Regions by what they are.  A name may be another region's the next time; an identity is
 * never given again, by no msharefs anywhere.  Who knows it may open the region as the mode
 * of its file allows, under whatever name, and when its name is gone.
 */
#define MSHARE_IDENTITY 16 /* bytes */

struct mshare_request {
	const char *name;              /* NULL with an identity */
	const unsigned char *identity; /* attach the region that this is, or NULL */
	const char *root;              /* where msharefs is mounted; NULL: mshare_root() */
	void *addr;                    /* of a new region; NULL: the daemon chooses */
	size_t size;                   /* of a new region; 0 if it has to exist */
	int oflags;                    /* as for mshare() */
	mode_t mode;
	const char *backing; /* as for mshare_backed() */
	unsigned flags;      /* of a new region */
};

#define MSHARE_EMPTY 1u     /* it begins without memory, as a hole */
#define MSHARE_DONATE 2u    /* it begins with what this process has in its range */
#define MSHARE_EPHEMERAL 4u /* it has no name: it ends with its last user, however that ends */

struct mshare_region {
	unsigned long start, size; /* its range */
	unsigned long length;      /* what its creator asked for, from start on */
	unsigned char identity[MSHARE_IDENTITY];
	unsigned char held, writable, created;
	char root[PATH_MAX]; /* the mount that it is of */
};

/*
 * Attach a region, or make one with O_CREAT, and hold it: other parts of this program may
 * hold the same one.  A new region begins with size bytes of zeros, or as flags say.
 *
 * The errors of mshare(), and
 * EADDRINUSE  this process has something where the region is to lie
 * ESTALE      no region has that identity any more
 * EPROTO      the daemon is too old for this
 */
int mshare_open(const struct mshare_request *request, struct mshare_region *region);

/* No longer hold it; the last one, and mshare_detach() if need be, unmaps the region. */
int mshare_close(struct mshare_region *region);

/*
 * Remove the region's name, if it has one, and no other region's of the same name; the
 * memory goes with the last sharer.  ESTALE: it is gone.  EACCES, EPERM: as unlink(2).
 */
int mshare_forget_name(const struct mshare_region *region);

/*
 * A heap: memory for all that have attached a region read-write, given out in pieces.  Its
 * state lies in the region, too.  Whoever is killed in a call leaves no lock and no piece
 * that is half given out.
 *
 * mshare_heap() makes a heap of all of a region that mshare_open() has filled with zeros, or
 * finds that it is one; from then on only pieces are anybody's to write.  mshare_alloc()
 * returns memory whose contents are anything, or NULL; any attached process may free it.
 * wait: at most so many milliseconds for others that are in the heap; -1: without end.
 *
 * EACCES     the region is attached read-only
 * EEXIST     there is something else in the region
 * EINVAL     it has no heap, or is too small for one; no piece begins there; an
 *            alignment that is no power of two
 * ENOMEM     no free piece is that large
 * ETIMEDOUT  others have been in the heap all the time
 * EUCLEAN    its state has been overwritten
 */
int mshare_heap(const struct mshare_region *region);
void *mshare_alloc(const struct mshare_region *region, size_t size, size_t alignment, int wait);
int mshare_free(const struct mshare_region *region, void *memory, int wait);

struct mshare_heap_info {
	unsigned long long size, used; /* bytes */
	unsigned long long pieces, largest; /* of which the largest could be had now, in bytes */
};
/* Look at all of a heap's state: whether it is whole, and what is in use. */
int mshare_heap_check(const struct mshare_region *region, struct mshare_heap_info *info, int wait);

/*
 * Objects with names in a heap.  The first call makes one, with the value (of a lock: 0);
 * it stays as long as the region.  ENOSPC: there are 1024.  EEXIST: it is of another kind.
 */
enum mshare_kind {
	MSHARE_LOCK = 1,
	MSHARE_SEMAPHORE = 2, /* 0 to INT_MAX */
	MSHARE_INTEGER = 3,   /* an int64_t, for the compiler's atomic operations */
};
void *mshare_named(const struct mshare_region *region, const char *name, enum mshare_kind kind,
		   long long value, int wait);

/*
 * A lock is a thread's: who has it already gets EDEADLK, who has not cannot unlock it
 * (EPERM).  EOWNERDEAD: it is had, and whoever had it before died with it; that is said to
 * everybody until mshare_repaired().  A region is not to be closed while a lock in it is
 * held.  *held, if held is not NULL, becomes 1 in the call that locks: also if a signal
 * handler runs before the caller sees the result.
 * Processes of different PID namespaces cannot share locks, nor heaps.
 */
int mshare_lock(void *lock, int wait, unsigned char *held);
int mshare_unlock(void *lock);
void mshare_repaired(void *lock);

/*
 * A semaphore belongs to nobody: what a killed process has taken stays taken.
 * EINTR: a signal was handled.  EOVERFLOW: it cannot be that much.
 */
int mshare_semaphore_wait(void *semaphore, int wait);
int mshare_semaphore_post(void *semaphore, int count);

/*
 * The compiler's atomic operations, sequentially consistent, for languages that have none:
 * on an integer of 1, 2, 4 or 8 bytes at a multiple of its width.  *before: what it was.
 */
enum mshare_atomic_op {
	MSHARE_LOAD,
	MSHARE_EXCHANGE,
	MSHARE_ADD,
	MSHARE_AND,
	MSHARE_OR,
	MSHARE_XOR,
	MSHARE_COMPARE_EXCHANGE, /* to value, if it is what is expected */
};
int mshare_atomic(enum mshare_atomic_op op, void *at, size_t width, unsigned long long value,
		  unsigned long long expected, unsigned long long *before);

/*
 * What the daemon, or the library, has to say of this thread's last error, once; may be
 * empty.  It is good until the next call.
 */
const char *mshare_reason(void);

/* Whether [addr, addr + length) may touch a region of this process: a quick guess. */
int mshare_near(const void *addr, size_t length);

#ifdef __cplusplus
}
#endif

#endif
