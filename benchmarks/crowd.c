/* SPDX-License-Identifier: MIT */
/*
 * A process that forks others, which share memory: crowd NAME START SIZE.  Each line of
 * its input is a command, each line of its output the answer:
 *
 *   create        make the memory
 *   fill          write a byte of every 4 KiB of it; the nanoseconds that it took
 *   add COUNT     so many children that attach it; how many did
 *   idle COUNT    so many that do not
 *   touch FIRST COUNT read|write|none
 *                 children of these numbers touch every 4 KiB, two at a time, or not; for
 *                 each its last minor faults and nanoseconds, "- -" if it was killed
 *
 * They end with it: in turn at the end of its input, at once if it is killed.
 */
#include "backend.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define MOST 4096
#define AT_ONCE 2

enum state { STARTING, RESTING, READING, WRITING, FAILED, DEAD };

struct child {
	_Atomic(uint32_t) state;
	pid_t pid;
	uint64_t faults, nanoseconds;
};

static struct child *children; /* shared with them */
static size_t how_many;
static const char *name;
static char *start;
static size_t size;

static void need(int result)
{
	if (result < 0) {
		fprintf(stderr, "crowd: %s\n", strerror(errno));
		exit(1);
	}
}

static void set_state(struct child *child, uint32_t state)
{
	atomic_store(&child->state, state);
	syscall(SYS_futex, &child->state, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

static void wait_while(struct child *child, uint32_t state, const struct timespec *most)
{
	syscall(SYS_futex, &child->state, FUTEX_WAIT, state, most, NULL, 0);
}

static uint64_t now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static void touch_all(int write)
{
	for (volatile char *page = start; page < start + size; page += PAGE) {
		if (write)
			*page = 1;
		else
			(void)*page;
	}
}

static uint64_t minor_faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return (uint64_t)usage.ru_minflt;
}

static _Noreturn void live(struct child *self, int attach)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	/* Whoever runs out of memory for us, the OOM killer is to choose us. */
	(void)!write(fd, "500", 3);
	close(fd);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (attach && backend_attach(name, start, size) < 0) {
		perror("crowd: attach");
		set_state(self, FAILED);
		_exit(1);
	}
	set_state(self, RESTING);
	for (;;) {
		uint32_t state = atomic_load(&self->state);
		uint64_t faults, since;

		if (state == RESTING) {
			wait_while(self, RESTING, NULL);
			continue;
		}
		faults = minor_faults();
		since = now();
		touch_all(state == WRITING);
		self->nanoseconds = now() - since;
		self->faults = minor_faults() - faults;
		set_state(self, RESTING);
	}
}

/* Until the child is no longer in that state, or has ended. */
static uint32_t settle(struct child *child, uint32_t busy)
{
	const struct timespec most = { .tv_nsec = 50000000 };
	uint32_t state;

	while ((state = atomic_load(&child->state)) == busy) {
		wait_while(child, busy, &most);
		if (waitpid(child->pid, NULL, WNOHANG) == child->pid)
			atomic_store(&child->state, DEAD);
	}
	return state;
}

static void add(size_t count, int attach)
{
	size_t first = how_many, good = 0;

	for (; count > 0 && how_many < MOST; count--) {
		struct child *child = &children[how_many];
		pid_t pid = fork();

		need(pid);
		if (pid == 0)
			live(child, attach);
		child->pid = pid;
		how_many++;
	}
	for (size_t i = first; i < how_many; i++)
		good += settle(&children[i], STARTING) == RESTING;
	printf("%zu\n", good);
}

static void touch(size_t first, size_t count, uint32_t how)
{
	size_t end = first + count < how_many ? first + count : how_many, next = first;

	for (size_t i = first; i < end; i++) {
		for (; next < end && next < i + AT_ONCE; next++) {
			/* It may have been killed while it rested. */
			if (waitpid(children[next].pid, NULL, WNOHANG) == children[next].pid)
				atomic_store(&children[next].state, DEAD);
			if (atomic_load(&children[next].state) == RESTING)
				set_state(&children[next], how);
		}
		if ((how == RESTING ? atomic_load(&children[i].state) :
				      settle(&children[i], how)) == RESTING)
			printf("%llu %llu ", (unsigned long long)children[i].faults,
			       (unsigned long long)children[i].nanoseconds);
		else
			printf("- - ");
	}
	printf("\n");
}

int main(int argc, char **argv)
{
	char line[256], how[16];
	size_t first, count;

	if (argc != 4)
		return 2;
	name = argv[1];
	start = (char *)(uintptr_t)strtoull(argv[2], NULL, 0);
	size = strtoull(argv[3], NULL, 0);
	children = mmap(NULL, MOST * sizeof *children, PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	need(children == MAP_FAILED ? -1 : 0);
	setvbuf(stdout, NULL, _IOFBF, 1 << 16);
	while (fgets(line, sizeof line, stdin)) {
		if (strcmp(line, "create\n") == 0) {
			need(backend_create(name, start, size));
			printf("0\n");
		} else if (strcmp(line, "fill\n") == 0) {
			uint64_t since = now();

			touch_all(1);
			printf("%llu\n", (unsigned long long)(now() - since));
		} else if (sscanf(line, "add %zu", &count) == 1) {
			add(count, 1);
		} else if (sscanf(line, "idle %zu", &count) == 1) {
			add(count, 0);
		} else if (sscanf(line, "touch %zu %zu %15s", &first, &count, how) == 3) {
			touch(first, count,
			      how[0] == 'w' ? WRITING :
			      how[0] == 'r' ? READING :
					      RESTING);
		} else {
			errno = EINVAL;
			need(-1);
		}
		fflush(stdout);
	}
	/* In turn: all at once they would wait for each other's locks for minutes. */
	for (size_t i = 0; i < how_many; i++) {
		for (size_t j = i; j < how_many && j < i + AT_ONCE; j++) {
			/* Nobody else's number: it is its own until it has been waited for. */
			if (atomic_load(&children[j].state) != DEAD)
				kill(children[j].pid, SIGKILL);
		}
		if (atomic_load(&children[i].state) != DEAD)
			waitpid(children[i].pid, NULL, 0);
	}
	return 0;
}
