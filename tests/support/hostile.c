/*
 * What mallory does in many threads at once, or between two instructions: a library that
 * hostile.py loads.  Each function starts its threads and returns, but where it says so.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <dirent.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

static void start(void *(*run)(void *), void *with)
{
	pthread_attr_t how;
	pthread_t thread;

	pthread_attr_init(&how);
	pthread_attr_setstacksize(&how, 65536);
	pthread_create(&thread, &how, run, with);
}

struct range {
	char *start;
	size_t size, stride;
	int threads, number, fd, how;
};

static void *storm_one(void *with)
{
	struct range *r = with;
	int zeros = open("/dev/zero", O_RDONLY | O_CLOEXEC);

	for (;;) {
		for (size_t at = (size_t)r->number * r->stride; at < r->size;
		     at += (size_t)r->threads * r->stride) {
			struct iovec one = { r->start + at, 1 };

			if (r->how == 0)
				*(volatile char *)(r->start + at) = 1;
			else
				(void)!readv(zeros, &one, 1);
		}
		if (r->number == 0 && r->fd >= 0)
			fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
				  (off_t)r->size);
	}
	return NULL;
}

/*
 * Touch it all again and again: HOW is 0 for stores, 1 for system calls, which may fail.
 * FD is the backing, which is emptied each time, or -1.
 */
void storm(char *at, size_t size, size_t stride, int threads, int fd, int how)
{
	for (int number = 0; number < threads; number++) {
		struct range *r = malloc(sizeof *r);

		*r = (struct range){ at, size, stride, threads, number, fd, how };
		start(storm_one, r);
	}
}

/* Touch each page once, by a system call; returns when that is done. */
void once(char *at, size_t pages, size_t stride)
{
	int zeros = open("/dev/zero", O_RDONLY | O_CLOEXEC);

	for (size_t page = 0; page < pages; page++) {
		struct iovec one = { at + page * stride, 1 };

		(void)!readv(zeros, &one, 1);
	}
	close(zeros);
}

static void *idle_one(void *with)
{
	(void)with;
	for (;;)
		pause();
	return NULL;
}

void idle(int threads)
{
	while (threads--)
		start(idle_one, NULL);
}

static const char *looked_at;
static int look_how;

static void *look_one(void *with)
{
	(void)with;
	for (;;) {
		struct stat found;
		DIR *directory;
		int fd;

		if (look_how == 0) {
			fd = open(looked_at, O_RDONLY | O_CLOEXEC);
			if (fd >= 0)
				close(fd);
		} else if (look_how == 1) {
			directory = opendir(looked_at);
			if (directory) {
				while (readdir(directory))
					;
				closedir(directory);
			}
		} else {
			stat(looked_at, &found);
		}
	}
	return NULL;
}

/* Open a path, list it, or ask for its status, for ever: HOW is 0, 1 or 2. */
void look(const char *path, int how, int threads)
{
	looked_at = strdup(path);
	look_how = how;
	while (threads--)
		start(look_one, NULL);
}

static void *seek_one(void *with)
{
	for (;;)
		lseek((int)(intptr_t)with, 0, SEEK_HOLE);
	return NULL;
}

void seek(int fd, int threads)
{
	while (threads--)
		start(seek_one, (void *)(intptr_t)fd);
}

static size_t allocated;

static void *allocate_one(void *with)
{
	int fd = (int)(intptr_t)with;

	for (;;) {
		fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)allocated);
		fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)allocated);
	}
	return NULL;
}

void allocate(int fd, size_t size, int threads)
{
	allocated = size;
	while (threads--)
		start(allocate_one, (void *)(intptr_t)fd);
}

static void *spin_one(void *with)
{
	for (volatile unsigned long n = 0;; n++)
		;
	return with;
}

/* What any program may do: compute. */
void spin(int threads)
{
	while (threads--)
		start(spin_one, NULL);
}

/* -- a lock that a process holds while it executes another program -- */

static struct {
	volatile int stage;
	const char *control;
	const char *hung;
	int memory, connection, fds[2];
	const void *request;
	size_t length;
	char child_stack[65536];
} executing;

static void until(int stage)
{
	while (executing.stage < stage)
		usleep(1000);
}

static int be_a_sharer_and_execute(void *with)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char buffer[256], rights[CMSG_SPACE(sizeof executing.fds)] = { 0 };
	struct iovec part = { (void *)executing.request, executing.length };
	struct msghdr message = { .msg_iov = &part,
				  .msg_iovlen = 1,
				  .msg_control = rights,
				  .msg_controllen = sizeof rights };
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);

	(void)with;
	strncpy(address.sun_path, executing.control, sizeof address.sun_path - 1);
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof executing.fds);
	memcpy(CMSG_DATA(head), executing.fds, sizeof executing.fds);
	executing.connection = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	if (connect(executing.connection, (struct sockaddr *)&address, sizeof address) == 0 &&
	    sendmsg(executing.connection, &message, 0) > 0)
		(void)!recv(executing.connection, buffer, sizeof buffer, 0);
	executing.stage = 1;
	until(2);
	execl("/bin/true", "true", (char *)NULL);
	_exit(1);
}

static void *read_hung(void *with)
{
	char byte;

	(void)with;
	until(1);
	(void)!pread(executing.memory, &byte, 1, (off_t)(uintptr_t)executing.hung);
	return NULL;
}

static void *wait_to_map(void *with)
{
	(void)with;
	until(1);
	usleep(300000);
	mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return NULL;
}

/*
 * A process of ours attaches with REQUEST and two descriptors.  Then it executes a program
 * and gets no further than to wait for the lock of the address space that it leaves, which
 * is ours too; meanwhile nobody can look into it.  We hold that lock by reading HUNG through
 * MEMORY, /proc/self/mem.  Then MORE is sent on its connection.  Takes a second, and does
 * not return.
 */
void execute_for_ever(const char *control, const char *hung, int memory, const void *request,
		      size_t length, int proof, int own, const void *more, size_t more_length)
{
	executing.control = control;
	executing.hung = hung;
	executing.memory = memory;
	executing.request = request;
	executing.length = length;
	executing.fds[0] = proof;
	executing.fds[1] = own;
	/* No page can be had once the lock is held: what is called then is called before. */
	usleep(1);
	(void)!send(-1, more, more_length, MSG_NOSIGNAL);
	start(read_hung, NULL);
	start(wait_to_map, NULL);
	clone(be_a_sharer_and_execute, executing.child_stack + sizeof executing.child_stack,
	      CLONE_VM | CLONE_FILES | SIGCHLD, NULL);
	until(1);
	usleep(600000);
	executing.stage = 2;
	usleep(300000);
	(void)!send(executing.connection, more, more_length, MSG_NOSIGNAL);
	for (;;)
		pause();
}
