/* SPDX-License-Identifier: MIT */
/*
 * A client that the tests tell what to do: a command a line on standard input, its
 * result a line on standard output.  Numbers are C's.  A call that fails prints
 * minus its errno; an access that ends in a signal prints the signal's name.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <mshare.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "losing.h"

static __thread sigjmp_buf landing;
static __thread volatile sig_atomic_t caught;

static __thread volatile unsigned long caught_at;

static void on_signal(int number, siginfo_t *information, void *context)
{
	(void)context;
	caught = number;
	caught_at = (unsigned long)information->si_addr;
	siglongjmp(landing, 1);
}

static volatile sig_atomic_t alarms;

static void on_alarm(int number)
{
	(void)number;
	alarms++;
}

static void say_errno(long result)
{
	printf("%ld\n", result < 0 ? -(long)errno : result);
}

/* Touch a byte per page: store VALUE, or load when it is negative. */
static void touch(char *from, size_t length, int value, size_t step)
{
	volatile char *volatile at = from;
	volatile unsigned long last = 0;

	if (sigsetjmp(landing, 1)) {
		printf("%s\n", caught == SIGBUS ? "SIGBUS" : "SIGSEGV");
		return;
	}
	for (size_t i = 0; i < length; i += step, at += step) {
		if (value >= 0)
			*at = (char)value;
		else
			last = (unsigned char)*at;
	}
	printf("%lu\n", value >= 0 ? 0 : last);
}

/* Every byte of the range has the value? */
static void check(const char *from, size_t length, int value)
{
	for (size_t i = 0; i < length; i++) {
		if ((unsigned char)from[i] != value) {
			printf("byte %zu is %d\n", i, (unsigned char)from[i]);
			return;
		}
	}
	printf("0\n");
}

/* The word that belongs at PLACE of memory filled with KEY; zeros for the key 0. */
static uint64_t word_of(uint64_t key, size_t place)
{
	uint64_t word = key + place * 0x9e3779b97f4a7c15;

	if (key == 0)
		return 0;
	word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9;
	return word ^ (word >> 27);
}

/* Fill with a pattern in which each word differs: key by key, place by place. */
static void stamp(volatile uint64_t *words, size_t length, uint64_t key)
{
	if (sigsetjmp(landing, 1)) {
		printf("%s\n", caught == SIGBUS ? "SIGBUS" : "SIGSEGV");
		return;
	}
	for (size_t i = 0; i < length / 8; i++)
		words[i] = word_of(key, i);
	printf("0\n");
}

/* Every word is of one of the patterns? */
static void verify(const volatile uint64_t *words, size_t length, const unsigned long *keys,
		   int count)
{
	if (sigsetjmp(landing, 1)) {
		printf("%s\n", caught == SIGBUS ? "SIGBUS" : "SIGSEGV");
		return;
	}
	for (size_t i = 0; i < length / 8; i++) {
		uint64_t found = words[i];
		int key = 0;

		while (key < count && found != word_of(keys[key], i))
			key++;
		if (key == count) {
			printf("word %zu is %#lx\n", i, (unsigned long)found);
			return;
		}
	}
	printf("0\n");
}

/* What /proc/self/maps and smaps say of an address. */
static void vma(unsigned long address)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	unsigned long from, to;
	char line[512], prot[8] = "none";

	while (fgets(line, sizeof line, maps)) {
		char found[8];

		if (sscanf(line, "%lx-%lx %7s", &from, &to, found) == 3 && from <= address &&
		    address < to)
			strcpy(prot, found);
	}
	fclose(maps);
	printf("%s\n", prot);
}

static void run(char *line, const char *self);

static void in_child(pid_t child, char *line, const char *self)
{
	int status;

	if (child < 0) {
		say_errno(-1);
		return;
	}
	if (child == 0) {
		run(line, self);
		fflush(stdout);
		_exit(0);
	}
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	if (WIFSIGNALED(status))
		printf("killed by %d\n", WTERMSIG(status));
}

struct job {
	char line[512];
	const char *self;
};

static void *in_thread(void *argument)
{
	struct job *job = argument;

	run(job->line, job->self);
	return NULL;
}

/* Writers for the donor's test: each counts up in its own page until told to stop. */
static volatile int stop_writing;

static void *count_up(void *page)
{
	volatile unsigned long *counter = page;

	while (!stop_writing)
		++*counter;
	return (void *)*counter;
}

/* mshare() while threads write; their last count must be what is in memory. */
static void donate_under_writers(const char *name, char *start, size_t size, int count)
{
	pthread_t threads[64];
	void *counted;

	if (count > 64)
		count = 64;
	stop_writing = 0;
	for (int i = 0; i < count; i++)
		pthread_create(&threads[i], NULL, count_up, start + (size_t)i * 4096);
	usleep(2000);
	if (mshare(name, start, size, O_CREAT | O_EXCL | O_RDWR, 0600) < 0) {
		say_errno(-1);
		exit(1);
	}
	usleep(2000);
	stop_writing = 1;
	for (int i = 0; i < count; i++) {
		pthread_join(threads[i], &counted);
		if (*(unsigned long *)(start + (size_t)i * 4096) != (unsigned long)counted) {
			printf("thread %d lost writes\n", i);
			return;
		}
	}
	printf("0\n");
}

static void wait_for_both(int *barrier)
{
	int turn = __atomic_load_n(&barrier[1], __ATOMIC_SEQ_CST);

	if (__atomic_add_fetch(&barrier[0], 1, __ATOMIC_SEQ_CST) == 2) {
		__atomic_store_n(&barrier[0], 0, __ATOMIC_SEQ_CST);
		__atomic_add_fetch(&barrier[1], 1, __ATOMIC_SEQ_CST);
	} else {
		while (__atomic_load_n(&barrier[1], __ATOMIC_SEQ_CST) == turn)
			sched_yield();
	}
}

/*
 * Two sharers touch pages of a freshly mapped file at the same moment, COUNT times.
 * No byte of the file is 0; they begin at both ends, so that they meet.
 */
static void race(char *start, size_t length, const char *path, unsigned long count)
{
	int *barrier = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int fd = open(path, O_RDONLY | O_CLOEXEC), status = 0;
	long empty = 0;
	pid_t child = fork();

	for (unsigned long i = 0; i < count; i++) {
		if (child && mmap(start, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd,
				  0) == MAP_FAILED) {
			perror("mmap");
			exit(1);
		}
		wait_for_both(barrier);
		for (size_t at = 0; at < length; at += 4096) {
			volatile char *page = start + (child || i % 2 ? at : length - 4096 - at);

			empty += page[0] == 0 || page[4095] == 0;
		}
		wait_for_both(barrier);
	}
	if (child == 0)
		_exit(empty != 0);
	waitpid(child, &status, 0);
	close(fd);
	printf("%ld\n", empty + status);
}

/*
 * Random calls and touches in [start, start + length), until killed: what comes of
 * each does not matter, only that it comes.
 */
static void churn(char *start, size_t length, const char *path, unsigned seed)
{
	static const int prots[] = { 0, 1, 3, 3 };
	size_t pages = length / 4096;

	srand(seed);
	for (;;) {
		size_t page = (size_t)rand() % pages, count = 1 + (size_t)rand() % 64;
		char *at = start + page * 4096;
		size_t size = (page + count > pages ? pages - page : count) * 4096;
		int prot = prots[rand() % 4], fd;

		switch (rand() % 10) {
		case 0:
			mmap(at, size, prot, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
			break;
		case 1:
		case 2:
			fd = open(path, O_RDWR | O_CLOEXEC);
			mmap(at, size, prot, (rand() % 2 ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED, fd,
			     (off_t)(rand() % 64) * 4096);
			close(fd);
			break;
		case 3:
			munmap(at, size);
			break;
		case 4:
			mprotect(at, size, prot);
			break;
		case 5:
			msync(at, size, MS_SYNC);
			break;
		case 6:
			madvise(at, size, MADV_DONTNEED);
			break;
		case 7:
			if (fork() == 0) {
				if (!sigsetjmp(landing, 1))
					*(volatile char *)at = 1;
				_exit(0);
			}
			wait(NULL);
			break;
		case 8:
			(void)!write(-1, at, 1);
			fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
			(void)!read(fd, at, size);
			close(fd);
			break;
		default:
			for (size_t i = 0; i < size; i += 4096) {
				if (!sigsetjmp(landing, 1))
					*(volatile char *)(at + i) += 1;
			}
		}
	}
}

/* The first byte of each of COUNT pages, in hexadecimal; what a touch gives instead. */
static void look(const volatile unsigned char *page, unsigned long count, size_t step)
{
	for (volatile unsigned long i = 0; i < count; i++) {
		if (sigsetjmp(landing, 1))
			printf("%s", caught == SIGBUS ? "--" : "!!");
		else
			printf("%02x", page[i * step]);
	}
	printf("\n");
}

struct disturbance {
	char *start;
	size_t count, step, place, own, owned;
	unsigned seed;
};

static volatile int calm;
static pthread_t disturber;

/*
 * Touch pages in every way, and write at one PLACE of each alone, until calm.  Not by system
 * calls in our OWN ones: what fails with EFAULT is out of our reach for an instant.
 */
static void *disturb(void *argument)
{
	struct disturbance *here = argument;
	int null = memfd_create("out", MFD_CLOEXEC), zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	volatile size_t page = 0;

	while (!calm) {
		char *at;

		page = rand_r(&here->seed) % 8 ? (page + 1) % here->count :
						 (size_t)rand_r(&here->seed) % here->count;
		at = here->start + page * here->step;
		if (sigsetjmp(landing, 1))
			continue;
		if (rand_r(&here->seed) % 256 == 0)
			msync(here->start, here->count * here->step, MS_SYNC);
		switch (rand_r(&here->seed) % 16 + 2 * (page - here->own < here->owned)) {
		case 0:
			(void)!pwrite(null, at, 1, 0);
			break;
		case 1:
			(void)!read(zero, at + here->place, 1);
			break;
		case 2:
		case 3:
		case 4:
			((volatile char *)at)[here->place] += 1;
			break;
		default:
			(void)*(volatile char *)at;
		}
	}
	close(null);
	close(zero);
	free(here);
	return NULL;
}

/* Each sends what is no message: who is served is told so (EPROTO). */
static int connect_often(const char *path, unsigned long count)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int served = 0;

	snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	for (unsigned long i = 0; i < count; i++) {
		int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
		struct {
			char head[8];
			int error;
			char rest[244];
		} reply = { .error = 0 };

		if (connect(sock, (struct sockaddr *)&address, sizeof address) < 0)
			return -errno;
		send(sock, "?", 1, MSG_NOSIGNAL); /* it may have hung up already */
		if (recv(sock, &reply, sizeof reply, 0) < 0)
			return -errno;
		served += reply.error == EPROTO;
	}
	return served;
}

static int listen_to_twin(void *self);
static pid_t twins_parent;

static void run(char *line, const char *self)
{
	char *words[8] = { 0 }, *rest = NULL, *position;
	int count = 0;
	unsigned long n[8] = { 0 };
	struct mshare_info info;
	struct rusage usage;

	rest = strchr(line, ' ');
	char copy[512];

	snprintf(copy, sizeof copy, "%s", rest ? rest + 1 : "");
	for (char *word = strtok_r(line, " \n", &position); word && count < 8;
	     word = strtok_r(NULL, " \n", &position)) {
		words[count] = word;
		n[count++] = strtoul(word, NULL, 0);
	}
	if (!words[0])
		return;
#define IS(name) (strcmp(words[0], name) == 0)
	if (IS("map")) { /* address length flags */
		void *got = mmap((void *)n[1], n[2], PROT_READ | PROT_WRITE,
				 (int)n[3] | MAP_ANONYMOUS, -1, 0);
		if (got != MAP_FAILED && got != (void *)n[1])
			errno = EEXIST;
		say_errno(got == (void *)n[1] ? 0 : -1);
	} else if (IS("mapfile")) { /* address length path */
		int fd = open(words[3], O_RDWR);
		void *got = mmap((void *)n[1], n[2], PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		say_errno(got == (void *)n[1] ? 0 : -1);
		close(fd);
	} else if (IS("mmap")) { /* address length prot flags [path open-flags offset] */
		int fd = words[5] ? open(words[5], (int)n[6] | O_CLOEXEC) : -1;
		void *got = mmap((void *)n[1], n[2], (int)n[3],
				 (int)n[4] | (fd < 0 ? MAP_ANONYMOUS : 0), fd, (off_t)n[7]);
		if (got == MAP_FAILED)
			say_errno(-1);
		else
			printf("%s\n", got == (void *)n[1] ? "0" : "elsewhere");
		if (fd >= 0)
			close(fd);
	} else if (IS("race")) { /* address length path count */
		fflush(stdout);
		race((char *)n[1], n[2], words[3], n[4]);
	} else if (IS("churn")) { /* address length path seed */
		churn((char *)n[1], n[2], words[3], (unsigned)n[4]);
	} else if (IS("munmap")) { /* address length */
		say_errno(munmap((void *)n[1], n[2]));
	} else if (IS("msync")) { /* address length flags */
		say_errno(msync((void *)n[1], n[2], (int)n[3]));
	} else if (IS("madvise")) { /* address length advice */
		say_errno(madvise((void *)n[1], n[2], (int)n[3]));
	} else if (IS("mremap")) { /* address old-length new-length flags target */
		void *got = mremap((void *)n[1], n[2], n[3], (int)n[4], (void *)n[5]);
		if (got == MAP_FAILED)
			say_errno(-1);
		else
			printf("%s\n", got == (void *)n[1] ? "0" : "elsewhere");
	} else if (IS("raw_mprotect")) { /* what the library does not see */
		say_errno(syscall(SYS_mprotect, n[1], n[2], n[3]));
	} else if (IS("mprotect")) {
		say_errno(mprotect((void *)n[1], n[2], (int)n[3]));
	} else if (IS("mshare")) { /* name address length oflags mode */
		say_errno(mshare(words[1], (void *)n[2], n[3], (int)n[4], (mode_t)n[5]));
	} else if (IS("mshare_empty")) {
		say_errno(mshare("", (void *)n[1], n[2], (int)n[3], 0600));
	} else if (IS("mshare_null")) {
		say_errno(mshare(NULL, (void *)n[1], n[2], (int)n[3], 0600));
	} else if (IS("unlink")) {
		say_errno(mshare_unlink(words[1]));
	} else if (IS("detach")) {
		say_errno(mshare_detach(words[1]));
	} else if (IS("reason")) { /* of the last call that failed */
		printf("%s\n", mshare_reason());
	} else if (IS("stat")) {
		if (mshare_stat(words[1], &info) < 0)
			say_errno(-1);
		else
			printf("%lu %lu\n", info.start, info.size);
	} else if (IS("load")) { /* address */
		touch((char *)n[1], 1, -1, 1);
	} else if (IS("store")) { /* address value */
		touch((char *)n[1], 1, (int)n[2], 1);
	} else if (IS("fill")) { /* address length value: a byte per page */
		touch((char *)n[1], n[2], (int)n[3], 4096);
	} else if (IS("scan")) { /* address length */
		touch((char *)n[1], n[2], -1, 4096);
	} else if (IS("check")) { /* address length value */
		check((char *)n[1], n[2], (int)n[3]);
	} else if (IS("stamp")) { /* address length key */
		stamp((uint64_t *)n[1], n[2], n[3]);
	} else if (IS("verify")) { /* address length key... */
		verify((uint64_t *)n[1], n[2], n + 3, count - 3);
	} else if (IS("look")) { /* address count step */
		look((const volatile unsigned char *)n[1], n[2], n[3]);
	} else if (IS("poke")) { /* address count step value: a byte per page */
		touch((char *)n[1], n[2] * n[3], (int)n[4], n[3]);
	} else if (IS("disturb")) { /* address count step place seed own owned */
		struct disturbance *here = malloc(sizeof *here);

		*here = (struct disturbance){ (char *)n[1], n[2], n[3], n[4],
						n[6], n[7], (unsigned)n[5] };
		calm = 0;
		say_errno(-(pthread_create(&disturber, NULL, disturb, here) != 0));
	} else if (IS("calm")) { /* an end of that */
		calm = 1;
		say_errno(-(pthread_join(disturber, NULL) != 0));
	} else if (IS("from_memory")) { /* address length: the kernel reads it */
		int null = memfd_create("out", MFD_CLOEXEC);
		say_errno(write(null, (void *)n[1], n[2]));
		close(null);
	} else if (IS("to_memory")) { /* address length: the kernel writes it */
		int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
		say_errno(read(zero, (void *)n[1], n[2]));
		close(zero);
	} else if (IS("guilty")) { /* address: what si_addr says of a store there */
		caught_at = 0;
		if (!sigsetjmp(landing, 1))
			*(volatile char *)n[1] = 1;
		printf("%lu\n", caught_at);
	} else if (IS("vma")) {
		vma(n[1]);
	} else if (IS("faults")) {
		getrusage(RUSAGE_SELF, &usage);
		printf("%ld\n", usage.ru_minflt);
	} else if (IS("fork")) { /* the rest is the child's command */
		fflush(stdout);
		in_child(fork(), copy, self);
	} else if (IS("clone")) { /* as fork, but no handler of the library's runs */
		fflush(stdout);
		in_child((pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0), copy, self);
	} else if (IS("branch")) { /* from now on a child takes the commands */
		fflush(stdout);
		if (fork() == 0)
			printf("%d\n", getpid());
		else
			for (;;)
				pause();
	} else if (IS("storm")) { /* that many children, forked at once, each touches ADDRESS */
		fflush(stdout);
		long bad = 0;
		int status;

		for (unsigned long i = 0; i < n[1]; i++) {
			pid_t child = fork();

			if (child == 0) {
				++*(volatile char *)n[2];
				_exit(0);
			}
			if (child < 0)
				bad++;
		}
		while (wait(&status) > 0)
			bad += status != 0;
		printf("%ld\n", bad);
	} else if (IS("thread")) {
		struct job job = { .self = self };
		pthread_t thread;

		snprintf(job.line, sizeof job.line, "%s", copy);
		pthread_create(&thread, NULL, in_thread, &job);
		pthread_join(thread, NULL);
	} else if (IS("background")) { /* a thread does the rest, and says what came of it */
		struct job *job = malloc(sizeof *job);
		pthread_t thread;

		job->self = self;
		snprintf(job->line, sizeof job->line, "%s", copy);
		pthread_create(&thread, NULL, in_thread, job);
		pthread_detach(thread);
	} else if (IS("bare_fork")) { /* what the child does is no matter */
		pid_t child = fork();

		if (child == 0)
			_exit(0);
		say_errno(child < 0 ? -1 : 0);
	} else if (IS("writers")) { /* name address length threads */
		donate_under_writers(words[1], (char *)n[2], n[3], (int)n[4]);
	} else if (IS("on_stack")) { /* address length, then the command of a thread that has its stack there */
		struct job job = { .self = self };
		pthread_attr_t attributes;
		pthread_t thread;

		snprintf(job.line, sizeof job.line, "%s", strchr(strchr(copy, ' ') + 1, ' ') + 1);
		pthread_attr_init(&attributes);
		pthread_attr_setstack(&attributes, (void *)n[1], n[2]);
		pthread_create(&thread, &attributes, in_thread, &job);
		pthread_attr_destroy(&attributes);
		pthread_join(thread, NULL);
	} else if (IS("cycle")) { /* name address length: attach, touch, detach until killed */
		for (unsigned long i = 0;; i++) {
			if (mshare(words[1], (void *)n[2], n[3], O_RDWR, 0) < 0)
				_exit(1);
			*(volatile char *)(n[2] + i * 65536 % n[3]) = 1;
			if (mshare_detach(words[1]) < 0)
				_exit(2);
		}
	} else if (IS("reader")) { /* name address: touch it, attached read-only and no more */
		mshare_detach(words[1]);
		if (mshare_attach(words[1], O_RDONLY, &info) < 0)
			say_errno(-1);
		else
			touch((char *)n[2], 1, -1, 1);
	} else if (IS("open")) { /* path flags mode */
		int fd = open(words[1], (int)n[2] | O_CLOEXEC, (mode_t)n[3]);
		say_errno(fd < 0 ? -1 : 0);
		close(fd);
	} else if (IS("connect")) { /* path count: how many are served; they stay open */
		printf("%d\n", connect_often(words[1], n[2]));
	} else if (IS("lose")) { /* way address length: see losing.h */
		say_errno(lose(words[1], (void *)n[2], n[3]));
	} else if (IS("twin")) { /* from now on another process that has our memory takes commands */
		static char stack[1 << 20] __attribute__((aligned(16)));

		fflush(stdout);
		twins_parent = getpid();
		if (clone(listen_to_twin, stack + sizeof stack, CLONE_VM | SIGCHLD, (void *)self) < 0)
			say_errno(-1);
		else
			_exit(0);
	} else if (IS("make_mutex")) { /* address: robust, and shared */
		pthread_mutexattr_t attributes;

		pthread_mutexattr_init(&attributes);
		pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
		pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
		printf("%d\n", pthread_mutex_init((pthread_mutex_t *)n[1], &attributes));
	} else if (IS("lock")) { /* address: waits for a second, says what came of it */
		struct timespec until;

		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += 1;
		printf("%d\n", pthread_mutex_timedlock((pthread_mutex_t *)n[1], &until));
	} else if (IS("bind_to_node_0")) { /* MPOL_BIND, as numactl(8) does */
		unsigned long node = 1;

		say_errno(syscall(SYS_set_mempolicy, 2, &node, 64));
	} else if (IS("chdir")) {
		say_errno(chdir(words[1]));
	} else if (IS("no_huge_pages")) {
		say_errno(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	} else if (IS("exec")) {
		fflush(stdout);
		execl(self, self, (char *)NULL);
		say_errno(-1);
	} else if (IS("true")) { /* an ordinary program instead of us */
		execl("/bin/echo", "echo", "0", (char *)NULL);
		say_errno(-1);
	} else if (IS("timer")) { /* microseconds: interrupt whatever can be; says how often it was */
		struct sigaction action = { .sa_handler = on_alarm }; /* not SA_RESTART */
		struct itimerval every = { { 0, (suseconds_t)n[1] }, { 0, (suseconds_t)n[1] } };

		sigaction(SIGALRM, &action, NULL);
		setitimer(ITIMER_REAL, &every, NULL);
		printf("%d\n", (int)alarms);
	} else if (IS("limit")) { /* which soft: see getrlimit(2) */
		struct rlimit limit;

		getrlimit((int)n[1], &limit);
		limit.rlim_cur = n[2] < limit.rlim_max ? n[2] : limit.rlim_max;
		say_errno(setrlimit((int)n[1], &limit));
	} else if (IS("hello")) {
		printf("0\n");
	} else {
		printf("what is %s?\n", words[0]);
	}
}

static void serve(const char *self)
{
	char line[512];

	/* read(2), not stdio: after exec or fork nobody else may have read ahead. */
	for (;;) {
		size_t length = 0;
		ssize_t got;

		while (((got = read(0, line + length, 1)) < 0 && errno == EINTR) ||
		       (got == 1 && line[length] != '\n' && length < sizeof line - 1))
			length += got == 1;
		if (got <= 0)
			return;
		line[length] = '\0';
		run(line, self);
	}
}

/* Not before its parent has ended. */
static int listen_to_twin(void *self)
{
	while ((pid_t)syscall(SYS_getppid) == twins_parent)
		usleep(1000);
	printf("0\n");
	serve(self);
	_exit(0);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_NODEFER | SA_SIGINFO };

	(void)argc;
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	serve(argv[0]);
	return 0;
}
