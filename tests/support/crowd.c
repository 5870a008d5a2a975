/* SPDX-License-Identifier: MIT */
/*
 * Thousands of sharers of one region, with little of anything else: a parent that is
 * told on standard input what to do, and its children.
 *
 *     crowd NAME ADDRESS LENGTH
 *
 *     attach N    the parent forks N times, and all the children attach the region at
 *                 the same moment
 *     join        the parent attaches it itself
 *     fork N      the parent forks N times; each child is a sharer by that alone
 *     leave       all children detach and end
 *     kill        all children are killed, with one call
 *
 * A child has a page fault of its own, touches what the others touch as well, counts
 * itself, and stays.  Each command answers with one
 * line: the number of processes that are well, or what went wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <mshare.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define MOST 65536
#define OWN (64 << 10) /* what the daemon populates at the least for a fault */
#define COMMON (1 << 20)

struct tally {
	int well, failed, error;
};

static const char *name;
static volatile char *start;
static size_t length;
static struct tally *tally;
static pid_t *children;
static int count;
static pid_t group;
/* Children wait for the other end to be closed: all go on at the same moment. */
static int gate[2], door[2];

static void wait_for(int pipe[2])
{
	char byte;

	/* Once: the number may be a descriptor of the library's by the second time. */
	if (pipe[1] >= 0)
		close(pipe[1]);
	pipe[1] = -1;
	while (read(pipe[0], &byte, 1) < 0 && errno == EINTR)
		;
}

static void failed(void)
{
	__atomic_store_n(&tally->error, errno, __ATOMIC_SEQ_CST);
	__atomic_add_fetch(&tally->failed, 1, __ATOMIC_SEQ_CST);
	_exit(1);
}

static void live(int number, int attach)
{
	volatile int *own;

	setpgid(0, group);
	if (attach) {
		close(door[1]);
		door[1] = -1;
		wait_for(gate);
		if (mshare(name, (void *)start, length, O_RDWR, 0) < 0)
			failed();
	}
	own = (volatile int *)(start + (length - (size_t)(number + 1) * OWN));
	*own = number;
	for (size_t at = 0; at < COMMON; at += PAGE)
		start[at + (size_t)(number % PAGE)] = (char)number;
	if (*own != number)
		failed();
	__atomic_add_fetch(&tally->well, 1, __ATOMIC_SEQ_CST);
	wait_for(door);
	_exit(mshare_detach(name) < 0);
}

static void reap(int *bad)
{
	int status;

	*bad = 0;
	for (int i = 0; i < count; i++) {
		if (waitpid(children[i], &status, 0) != children[i] || status != 0)
			++*bad;
	}
	count = 0;
	group = 0;
}

static void start_children(int number, int attach)
{
	struct tally none = { 0 };

	if (count > 0 || number < 1 || number > MOST ||
	    (size_t)number * OWN + COMMON > length) {
		printf("impossible\n");
		return;
	}
	*tally = none;
	if (pipe2(gate, O_CLOEXEC) < 0 || pipe2(door, O_CLOEXEC) < 0) {
		printf("pipe: %s\n", strerror(errno));
		return;
	}
	for (int i = 0; i < number; i++) {
		pid_t child = fork();

		if (child < 0) {
			printf("fork: %s\n", strerror(errno));
			break;
		}
		if (child == 0)
			live(i, attach);
		if (!group)
			group = child;
		setpgid(child, group); /* whichever of the two comes first */
		children[count++] = child;
	}
	close(gate[0]);
	close(gate[1]);
	close(door[0]);
	while (__atomic_load_n(&tally->well, __ATOMIC_SEQ_CST) < number) {
		siginfo_t ended = { 0 };

		/* All stay until they are told to go. */
		waitid(P_PGID, (id_t)group, &ended, WEXITED | WNOHANG | WNOWAIT);
		if (ended.si_pid) {
			printf("a child ended (code %d, status %d), %d failed: %s\n",
			       ended.si_code, ended.si_status,
			       __atomic_load_n(&tally->failed, __ATOMIC_SEQ_CST),
			       strerror(tally->error));
			return;
		}
		usleep(1000);
	}
	printf("%d\n", number);
}

int main(int argc, char **argv)
{
	char line[128];
	int bad;

	if (argc != 4)
		return 2;
	name = argv[1];
	start = (char *)strtoul(argv[2], NULL, 0);
	length = strtoul(argv[3], NULL, 0);
	setvbuf(stdout, NULL, _IONBF, 0);
	tally = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	children = calloc(MOST, sizeof *children);
	if (tally == MAP_FAILED || !children)
		return 3;
	while (fgets(line, sizeof line, stdin)) {
		if (strncmp(line, "join", 4) == 0) {
			if (mshare(name, (void *)start, length, O_RDWR, 0) < 0)
				printf("mshare: %s\n", strerror(errno));
			else
				printf("1\n");
		} else if (strncmp(line, "attach ", 7) == 0) {
			start_children(atoi(line + 7), 1);
		} else if (strncmp(line, "fork ", 5) == 0) {
			start_children(atoi(line + 5), 0);
		} else if (strncmp(line, "leave", 5) == 0) {
			int were = count;

			close(door[1]);
			reap(&bad);
			printf("%d\n", were - bad);
		} else if (strncmp(line, "kill", 4) == 0) {
			int were = count;

			kill(-group, SIGKILL);
			reap(&bad);
			close(door[1]);
			printf("%d\n", bad == were ? were : -1);
		} else {
			printf("what?\n");
		}
	}
	return 0;
}
