/* SPDX-License-Identifier: MIT */
/*
 * internal.h - what the parts of the client core share.
 *
 * Everything that runs in a child after fork must be async-signal-safe, because
 * another thread may have held any lock in the parent (fork(2)): such functions
 * make system calls only, and say so.
 */
#ifndef MSHARE_INTERNAL_H
#define MSHARE_INTERNAL_H

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/types.h>

#include "../include/mshare.h"
#include "wire.h"

#define MSHARE_EXPORT __attribute__((visibility("default")))

/* syscall.c: system calls that no interposed function sees.  Result or -errno. */
long raw_syscall(long number, long a, long b, long c, long d, long e, long f);
void *raw_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset);
int raw_munmap(void *addr, size_t length);
int raw_mprotect(void *addr, size_t length, int prot);
int raw_msync(void *addr, size_t length, int flags);
int raw_madvise(void *addr, size_t length, int advice);
/* Move a mapping to an address, in place of what is there. */
int raw_mremap(void *from, size_t length, void *to);
/* What a descriptor is reached by where a path is wanted.  Threads may have tables of their own. */
#define FD_PATH_MAX 40
void path_of(int fd, char path[FD_PATH_MAX]);
void close_keeping_errno(int fd); /* -1: nothing */

/* held.c: all async-signal-safe. */
/* A descriptor that is kept, and the file that it was: its number may be the program's by now. */
struct held {
	int fd; /* -1: none */
	dev_t device;
	ino_t inode;
};
#define HELD_NOTHING ((struct held){ .fd = -1 })
void held_take(struct held *held, int fd);
bool held_is_ours(const struct held *held);
/* Unless it is the program's. */
void held_close(struct held *held);

/* root.c */
/* The root of a msharefs that is to be trusted. */
struct root {
	int fd; /* what everything in it is reached by; O_PATH */
	dev_t device;
	ino_t inode;
	bool searched;       /* nobody said where it is */
	char path[PATH_MAX]; /* what led there: to look again, and to show */
};

/*
 * Where msharefs is mounted; -1 with ENOENT if it is nowhere, EPERM if there is none but
 * what others have mounted.  Asks the daemon nothing.  The caller closes it.
 */
int root_find(struct root *root);
void root_close(struct root *root);
/* The same for the library's calls, found anew only if it has to be. */
int root_use(struct root *root);
/* What its path leads to by now.  Async-signal-safe. */
int root_use_again(const char *path, struct root *root);
/* Keep nothing open. */
void root_forget(void);
/* Its .control, by O_PATH; asks the daemon only if it is not kept.  Async-signal-safe. */
int root_control(const struct root *root);
/* Nobody has what is kept in hands: for fork(). */
void root_lock(void);
void root_unlock(void);
/* What addresses and sizes of its regions are multiples of (bytes); 0 with errno. */
size_t root_alignment(int root);

/* connection.c: all async-signal-safe. */
int connection_open(const struct root *root);
/*
 * Send one request and wait for its reply.  *reply_fd gets the descriptor that
 * came with it, or -1.  Returns 0, or -1 with the daemon's errno, or CONNECTION_LOST
 * with ENOTCONN: whether the call was done cannot be told.
 */
#define CONNECTION_LOST (-2)
/* What the daemon says to the last error of this thread: mshare_reason(). */
void reason_forget(void);
void reason_say(const char *text);
bool reason_is_said(void);
int connection_call(int connection, const struct mshare_wire_request *request,
		    const struct mshare_wire_object *objects, const int *fds, size_t fd_count,
		    struct mshare_wire_reply *reply, int *reply_fd);
/* Whether a note has come: 1, or 0, or CONNECTION_LOST. */
int connection_noted(int connection);

/* populate.c */
#ifndef MADV_POPULATE_READ /* headers before 5.14 */
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
/*
 * madvise(2) with either of these, of a region's pages; holds no lock.  EFAULT: they cannot be
 * had.  For the Python package, too.
 */
int mshare_populate(void *start, size_t length, int advice);

/* apart.c: for the Python package, which has the same struct (core.py). */
enum { APART_NEVER, APART_RUNS, APART_DONE };
enum { APART_OPEN, APART_CLOSE, APART_FORGET_NAME };
struct mshare_apart {
	const struct mshare_request *request; /* of mshare_open() */
	struct mshare_region *region;
	int call;
	int state;
	int result;
	int error; /* errno */
	char reason[sizeof((struct mshare_wire_reply *)0)->message];
	bool here; /* the thread begins on one processor */
	cpu_set_t allowed;
	pthread_t thread;
	sem_t done;
};
/* Have a thread make the call; -1 if there is none to be had (EAGAIN). */
int mshare_apart_begin(struct mshare_apart *apart);
/* Make it here. */
void mshare_apart_make(struct mshare_apart *apart);
/*
 * 1 if the call goes on, after so many milliseconds, or because a signal has come; else 0.
 * By one thread at a time.
 */
int mshare_apart_wait(struct mshare_apart *apart, int milliseconds);

/* bring.c: for the Python package. */
/* Map memory whose contents will be brought by mshare_fill(), in place of what is there. */
int mshare_await(void *addr, size_t length, int prot, int flags);
/*
 * Bring them: those of the memfd, from its first byte on.  `wanted`: the offset in the region
 * at which somebody waits for what is still to come, or UINT64_MAX.
 */
int mshare_fill(void *addr, size_t length, int fd, uint64_t *wanted);

/* waiting.c */
/* For one call of a program, however many daemons die in it; begins as zeros. */
struct waiting {
	double until; /* seconds, CLOCK_MONOTONIC */
	long pause;   /* nanoseconds; 0: has not begun */
};

/* Whether an errno says that there was a daemon and is none. */
bool daemon_is_gone(int error);
/* Let some time pass; false with ENOTCONN when there is none left. */
bool wait_again(struct waiting *waiting);

/* uffd.c: all async-signal-safe. */
/*
 * A new userfaultfd of this process; asks the daemon for the device if it must.  proof:
 * of the right to the region, as for ATTACH.
 */
int uffd_open(int connection, int proof);
/* Whether this process was given one that serves no faults of the kernel. */
bool uffd_is_for_code_only(void);
/* The same in two steps, for who has no proof yet: UFFD_ASK if the second is needed. */
#define UFFD_ASK (-2)
int uffd_open_unaided(void);
int uffd_ask(int connection, int proof);
int uffd_handshake(int uffd, uint64_t features);
int uffd_register(int uffd, void *addr, size_t length, uint64_t mode);
int uffd_unregister(int uffd, void *addr, size_t length);
int uffd_write_protect(int uffd, void *addr, size_t length);
#define UFFD_MISSING 1u
#define UFFD_WRITE_PROTECT 2u

/* attachment.c: the list */
struct attachment {
	struct attachment *next;
	unsigned users;		 /* the list, and calls; under the list's lock */
	pthread_mutex_t calling; /* what follows is its holder's */
	bool detached;
	char name[NAME_MAX + 1];
	char *start;
	size_t size;
	bool writable;
	bool created;     /* by this process */
	bool plain;       /* attached by mshare() or the like, which mshare_detach() ends */
	unsigned holders; /* mshare_open() that no mshare_close() has ended */
	unsigned char identity[MSHARE_IDENTITY]; /* zeros: an older daemon does not tell */
	size_t length;                           /* of what its creator wanted; or 0 */
	ino_t file;                              /* of the region, in the mount */
	bool asking; /* for the identity, by ATTACH itself */
	struct held connection; /* its end tells the daemon that this sharer is gone */
	struct held uffd;       /* kept for life: if the daemon dies, faults wait */
	struct held backing;    /* the proof of a child after fork, and to the next daemon */
	char *undumped, *undumped_end; /* MADV_DONTDUMP: for a child, too; in one piece */
	uint32_t calls;
	bool repeated; /* an attach before may have been done */
	bool sized;    /* the daemon gives new names ranges, and regions memory with ATTACH */
	struct waiting waiting;
	char root[PATH_MAX]; /* the path that led to it; last: little of it is ever touched */
};

void attachment_lock(void);
void attachment_unlock(void);
/* Whether there is one. */
bool attachment_any(void);
/* In a child after fork: nobody else holds any lock. */
void attachment_alone(void);
/* The next want the lock held.  NULL for none. */
struct attachment *attachment_first(void);
struct attachment *attachment_at(const char *address);
/* The lowest start of an attachment above the address. */
char *attachment_above(const char *address);
/* Whether one lies in that range.  Takes the lock itself. */
bool attachment_lies_in(const char *start, size_t size);
/* The plain attachment of a name. */
struct attachment *attachment_named(const char *name);
/* The attachment of a region. */
struct attachment *attachment_of(const unsigned char identity[MSHARE_IDENTITY]);
/* It stays until it is given back. */
struct attachment *attachment_take(struct attachment *attachment);
/*
 * The attachment of that region, if there is one; if not, others who want it wait for the one
 * that is beginning.  Waits for those that are about to attach the region, or to leave it.
 */
struct attachment *attachment_claim(struct attachment *beginning,
				    const unsigned char identity[MSHARE_IDENTITY]);
/*
 * Its file is that.  Whether nobody else here has that region, or is about to, and it may be
 * left to ATTACH to tell which it is: attachment_learn().  Who comes later waits for that.
 */
bool attachment_is_only(struct attachment *attachment, ino_t file, bool may_be);
void attachment_learn(struct attachment *attachment,
		      const unsigned char identity[MSHARE_IDENTITY]);
/* It is in the list no more, and who wants the same waits until it is settled. */
void attachment_end(struct attachment *attachment);
/* From here on the lock is not held. */
void attachment_give_back(struct attachment *attachment);
/* A new one, of nothing yet, that will not be in the way there.  NULL with errno. */
struct attachment *attachment_new(char *start, size_t size);
void attachment_free(struct attachment *attachment);
/* One call at a time: 0, or -1 with ENOENT if it has been detached meanwhile. */
int attachment_enter(struct attachment *attachment);
void attachment_leave(struct attachment *attachment);
/* Nobody else attaches the same from here on, until it is settled. */
void attachment_begin(struct attachment *attachment);
/* Where it is going to lie, and how large it is. */
void attachment_place(struct attachment *attachment, char *start, size_t size);
void attachment_settle(struct attachment *attachment, bool attached);
/* Close its connection and userfaultfd; and all its descriptors.  Async-signal-safe. */
void attachment_hang_up(struct attachment *attachment);
void attachment_drop(struct attachment *attachment);

/* rejoin.c: async-signal-safe. */
/*
 * What proves the right to it, and *close whether that is to be closed: the backing, or,
 * if the program has closed that, the region's file.
 */
int attachment_proof(const struct attachment *attachment, int root, bool *close);
/* Whether the memory was cut to nothing: by `msharefsd --purge`, and no daemon will know it. */
bool attachment_was_purged(const struct attachment *attachment);
/* As connection_call() on its connection; if that is lost, on one to the next daemon. */
int attachment_call(struct attachment *attachment, const struct mshare_wire_request *request,
		    const struct mshare_wire_object *objects, const int *fds, size_t fd_count,
		    struct mshare_wire_reply *reply, int *reply_fd);

/* fork.c */
/* From now on a child attaches what its parent has attached. */
void fork_handle(void);

/* names.c */
/* Whether a region may have the name: 0, or -1 with errno. */
int name_check(const char *name);
/* A call about a name has failed: say why, where errno alone tells it and nothing is said. */
void name_explain(void);
/*
 * root_use() for a call that may wait: between two daemons the mount is not there for
 * a moment, and only who knows that there was one can tell that from no msharefs at all.
 */
int name_root(const struct waiting *waiting, struct root *root);
/* Which file of the mount that is. */
ino_t name_number(int region);
/*
 * The region's file; ESTALE if there is none any more.  By its name only if the daemon does
 * not know identities.
 */
int name_reopen(int root, const struct attachment *attachment);
/* Whether a file is new, and whether it has been given a range for its memory. */
enum made { NOT_MADE, MADE, MADE_SIZED };
/*
 * Open a region's file as mshare() has to.  length: bytes of the range that a new one is to be
 * given, if that is left to the daemon; else 0.
 */
int name_open(int root, const char *name, int oflags, mode_t mode, size_t length, bool repeated,
	      enum made *made);
/* The same for the region of an identity, whatever its name is.  ESTALE: it is gone. */
int name_open_identity(int root, const unsigned char identity[MSHARE_IDENTITY], int oflags);
/* Remove the name that a region has, if it has one and no other region has got it. */
int name_unlink_identity(int root, const unsigned char identity[MSHARE_IDENTITY]);
/* Remove the name that name_open() has made, unless somebody has given it a range. */
void name_unmake(int root, const char *name, int region);
/* Remove the name of a region that this process has not attached. */
int name_unlink(const char *name);
/* Why a name could not be removed, if that is its owner's right. */
void name_say_whose(int error);

/* details.c: what a region's file tells and takes at DETAILS_OFFSET, beyond its end. */
#define DETAILS_OFFSET 4096
#define REGION_INODES 8 /* numbers in the mount that belong to one region */
struct details {
	unsigned char identity[MSHARE_IDENTITY];
	uint64_t length;
	uint64_t start, size; /* or what is kept for it, as long as it has no range */
};
/* 0, or -1 with errno; EPROTO if the daemon does not know it. */
int details_read(int region, struct details *details);
/*
 * Have the daemon choose a range for length bytes, in which this process has nothing, and
 * reserve it here.  placed: it has chosen one already, which may do.
 */
int details_place(int region, size_t length, bool placed, struct details *details);
/* The reason why it cannot. */
void details_say_no_room(void);

/* What is asked of attach.c beside the attachment. */
struct wish {
	const struct mshare_request *open; /* of mshare_open(); else NULL */
	size_t length; /* bytes, if its range is the daemon's choice, or if it begins with zeros */
	bool placed;   /* its range is the daemon's choice */
	bool zeros;    /* a new one begins with anonymous memory */
	bool alone;    /* what this process has in the range does not become the region's */
};
/* Attach or create, as mshare() does; *info and *region may be NULL.  Takes the lock. */
int attach_region(const char *name, char *start, size_t size, int oflags, mode_t mode,
		  uint32_t kind, const struct wish *wish, struct mshare_info *info,
		  struct mshare_region *region);

/* A backing by its name; NULL: what the environment says, and empty what the daemon does. */
int kind_of(const char *backing, uint32_t *kind);
/* Whether oflags has an access mode and none but O_CLOEXEC and `more` besides. */
bool known_flags(int oflags, int more);

/* detach.c: end a sharer, which attachment_end() has taken from the list. */
int detach_region(struct attachment *attachment, uint16_t op);

/* What a donor has mapped in the range of a region to be. */
struct vma {
	char *vma_start, *vma_end; /* as /proc/self/maps has it */
	char *start, *end;         /* its part in the region */
	int prot;
	bool shared;
	bool mapped;  /* of a file, not anonymous */
	off_t offset; /* of vma_start in the file */
	int file;     /* the file, or that of shared anonymous memory; or -1 */
};

#define SCRATCH ((size_t)16 << 20)

struct donation {
	struct attachment *attachment;
	struct vma *vmas;
	size_t count, capacity;
	char *start;
	int backing;
	int memory; /* /proc/self/mem, for what is not readable, and for huge pages */
	size_t page;
	size_t huge; /* the backing's pages, if it is of huge pages; or 0 */
	char *scratch; /* SCRATCH bytes, not of malloc(): that may be waiting for us */
	bool counting;
	size_t counted; /* huge pages that will be needed */
	uintptr_t last_counted;
};

/* maps.c: fill in donation->vmas, with the files of those that are of files. */
int maps_find(struct donation *donation, char *end);
/* Whether some of them only keep addresses free, for somebody else; or -1 with errno. */
int maps_reserved(const struct donation *donation);

/* copy.c */
/* Stop writers of a range that exists, then copy it; or count it (donation->counting). */
int copy_frozen(struct donation *donation, int freezer, const struct vma *vma, char *from,
		char *to);

/* present.c */
/* How many huge pages it takes, into donation->counted. */
int present_count(struct donation *donation);
/* Copies everything; *freezer holds back writers from then on, until it is closed. */
int present_copy(struct donation *donation, char *end, bool files_known, int *freezer);

/*
 * donate.c: make what is mapped in its range the region's memory.
 * *complete: on failure, whether the region is there nevertheless, and is to go.
 */
int donate(struct attachment *attachment, bool *complete);
/* The same with zeros: length bytes of anonymous memory, and nothing is copied. */
int donate_zeros(struct attachment *attachment, size_t length, bool *complete);

/* policy.c: a new region takes the memory policy of who makes it. */
void policy_hand_on(char *start, size_t size);

/* window.c: async-signal-safe. */
/* Keep the range free of other mappings; 1 if it has some, -1 with errno. */
int window_reserve(char *start, size_t size);
/* The same in place of a window, if there is one. */
int window_take_away(char *start, size_t size);
/*
 * The window is registered and not open: have the daemon protect in it what is
 * protected, if there is anything.  flags: of the reply to ATTACH or COMMIT.
 */
int window_ready(struct attachment *attachment, uint32_t flags);
/* Map the backing over a reserved range, guarded before anything can touch it. */
int window_map(struct attachment *attachment, uint32_t flags);
/*
 * New memory that is not in a range, and not malloc()'s: its heap may be there.  NULL with
 * errno.
 */
void *memory_outside(const char *start, size_t size, size_t length, int prot);
/* MADV_DONTDUMP or MADV_DODUMP, of a part of the window. */
int window_dump(struct attachment *attachment, char *start, size_t length, int advice);
/* Room for a window that is going to be moved to [start, start + size); NULL with errno. */
char *window_room(char *start, size_t size);
/*
 * As window_map(), over mappings that other threads may be using, and not of huge pages;
 * see donate.c.  room is used up.  protect: some of its pages will be write-protected.
 */
int window_replace(char *room, char *start, size_t size, int backing, int uffd, bool writable,
		   bool protect);

#endif
