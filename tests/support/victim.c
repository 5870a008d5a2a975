/*
 * Alice: `victim BOARD NAME START MODE FILE CREATE PAUSE [OTHER]`.  She has a region that she
 * creates, or attaches if CREATE is 0, and does all that a program does with it, for ever:
 * touches fresh pages, maps, unmaps and protects, reads a mapped file, forks, and looks
 * around in the mount.  After each thing she notes on a board that others see that it is
 * done, and how long it took.  Whatever she reads is checked: contents that are not hers
 * end her with exit code 1 and a sentence on the board.
 *
 * A thread of hers attaches OTHER, which may take as long as it likes.
 *
 * FILE holds the byte 'F' and nothing else.  tests/support/victim.py reads the board.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <mshare.h>

enum { PAGE = 4096, SPOTS = 64, STRIDE = 1 << 18, AREA = SPOTS * STRIDE, FILE_PAGES = 16 };
enum { TOUCH, CALL, FORK, STAT, LIST, KINDS };
enum { SAMPLES = 1 << 15 };

struct board {
	uint64_t pid;
	uint64_t doing; /* 1 + the kind of what is under way */
	uint64_t since; /* CLOCK_MONOTONIC, nanoseconds */
	uint64_t paused; /* set by the test: do nothing */
	uint64_t rests; /* she sees that */
	uint64_t answered; /* how often she was told what became of OTHER */
	uint64_t done[KINDS];
	uint64_t refused[KINDS]; /* while the daemon is away the mount says ENOTCONN */
	char trouble[256];
	uint32_t microseconds[KINDS][SAMPLES];
};

static struct board *board;
static char *start;
static const char *root, *name;
static useconds_t wait_between;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void __attribute__((format(printf, 1, 2), noreturn)) trouble(const char *format, ...)
{
	va_list values;
	int code = errno;
	size_t length;

	va_start(values, format);
	vsnprintf(board->trouble, sizeof board->trouble, format, values);
	va_end(values);
	length = strlen(board->trouble);
	snprintf(board->trouble + length, sizeof board->trouble - length, " (errno: %s)",
		 strerror(code));
	_exit(1);
}

static void begin(int kind)
{
	board->since = now();
	__atomic_store_n(&board->doing, (uint64_t)kind + 1, __ATOMIC_RELEASE);
}

static void end(int kind)
{
	uint64_t took = (now() - board->since) / 1000, number = board->done[kind];

	board->microseconds[kind][number % SAMPLES] = took > UINT32_MAX ? UINT32_MAX
									: (uint32_t)took;
	__atomic_store_n(&board->doing, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&board->done[kind], number + 1, __ATOMIC_RELEASE);
	if (wait_between)
		usleep(wait_between);
}

static void map(char *at, size_t length, int prot, int flags, int fd)
{
	begin(CALL);
	if (mshare_mmap(at, length, prot, flags | MAP_FIXED, fd, 0) != at)
		trouble("mmap of %zu bytes, flags %#x", length, (unsigned)flags);
	end(CALL);
}

static void protect(char *at, size_t length, int prot)
{
	begin(CALL);
	if (mshare_mprotect(at, length, prot) < 0)
		trouble("mprotect to %d", prot);
	end(CALL);
}

static void touch(char *at, uint64_t expected, uint64_t value)
{
	volatile uint64_t *word = (volatile uint64_t *)at;
	uint64_t found;

	begin(TOUCH);
	found = *word;
	*word = value;
	end(TOUCH);
	if (found != expected)
		trouble("at offset %#lx there is %#lx and not %#lx", (long)(at - start),
			(long)found, (long)expected);
}

/* What is there already, and has to be hers: no first touch, so its time does not count. */
static void look_again(char *at, uint64_t expected)
{
	uint64_t found;

	begin(TOUCH);
	found = *(volatile uint64_t *)at;
	__atomic_store_n(&board->doing, 0, __ATOMIC_RELEASE);
	if (found != expected)
		trouble("at offset %#lx there is %#lx and no more %#lx", (long)(at - start),
			(long)found, (long)expected);
}

/* A page that she hides and shows again is as it was. */
static void hide(char *at, uint64_t value)
{
	touch(at, 0, value);
	protect(at, PAGE, PROT_NONE);
	protect(at, PAGE, PROT_READ | PROT_WRITE);
	look_again(at, value);
}

/* The kernel may not write where she may only read: EFAULT, and no hanging. */
static void refuse(char *at)
{
	static int zeros = -1;

	if (zeros < 0)
		zeros = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	begin(CALL);
	if (read(zeros, at, 16) != -1 || errno != EFAULT)
		trouble("read(2) into memory that is read-only succeeded");
	end(CALL);
}

static void read_file(char *at, int fd)
{
	map(at, FILE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
	for (int page = 0; page < FILE_PAGES; page += 5) {
		volatile char *byte = at + page * PAGE;
		char found;

		begin(TOUCH);
		found = *byte;
		end(TOUCH);
		if (found != 'F')
			trouble("page %d of her file begins with %#x", page, (unsigned)found);
	}
}

static void fork_once(uint64_t expected)
{
	int status;
	pid_t child;

	begin(FORK);
	child = fork();
	if (child == 0) {
		if (*(volatile uint64_t *)start != expected)
			_exit(2);
		*(volatile char *)(start + STRIDE - PAGE) = 1;
		_exit(0);
	}
	if (child < 0 || waitpid(child, &status, 0) != child)
		trouble("fork");
	if (status != 0)
		trouble("her child ended with status %#x", (unsigned)status);
	end(FORK);
}

static int is_away(int error)
{
	return error == ENOTCONN || error == ECONNABORTED || error == ENOENT;
}

static void look(void)
{
	char path[4096];
	struct stat found;

	snprintf(path, sizeof path, "%s/%s", root, name);
	for (;;) {
		begin(STAT);
		if (stat(path, &found) == 0)
			break;
		if (!is_away(errno))
			trouble("stat %s", path);
		board->refused[STAT]++;
		usleep(5000);
	}
	end(STAT);
}

static void list(void)
{
	for (;;) {
		struct dirent *entry;
		int seen = 0;
		DIR *directory;

		begin(LIST);
		directory = opendir(root);
		if (directory) {
			while ((entry = readdir(directory)))
				seen |= strcmp(entry->d_name, name) == 0;
			closedir(directory);
		}
		if (seen)
			break;
		board->refused[LIST]++;
		usleep(5000);
	}
	end(LIST);
}

static void one_round(uint64_t round, int file)
{
	char *small = start + AREA, *guarded = small + 16 * PAGE, *mapped = small + 512 * PAGE;

	map(start, AREA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	for (int spot = 0; spot < SPOTS; spot++) {
		touch(start + spot * STRIDE, 0, round << 8 | (uint64_t)spot);
		if (spot % 8 == 0)
			look();
		if (spot % 16 == 1)
			fork_once(round << 8);
		if (spot % 16 == 2)
			list();
		if (spot % 32 == 3) {
			map(small, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			    -1);
			hide(small + PAGE, ~round);
			map(guarded, PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1);
			refuse(guarded);
			read_file(mapped, file);
		}
		while (__atomic_load_n(&board->paused, __ATOMIC_ACQUIRE)) {
			board->rests = 1;
			usleep(1000);
		}
		board->rests = 0;
	}
	for (int spot = 0; spot < SPOTS; spot++)
		look_again(start + spot * STRIDE, round << 8 | (uint64_t)spot);
	begin(CALL);
	if (mshare_munmap(start, AREA) < 0)
		trouble("munmap");
	end(CALL);
}

static void *attach_other(void *other)
{
	struct mshare_info info;

	for (;;) {
		int failed = mshare_attach(other, O_RDWR, &info);

		board->answered++;
		if (!failed)
			mshare_detach(other);
		usleep(50000);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	int fd = argc < 8 ? -1 : open(argv[1], O_RDWR | O_CLOEXEC), file, mode, create;

	if (fd < 0) {
		fprintf(stderr, "victim BOARD NAME START MODE FILE CREATE PAUSE [OTHER]\n");
		return 2;
	}
	board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	board->pid = (uint64_t)getpid();
	root = getenv("MSHARE_ROOT");
	name = argv[2];
	start = (char *)strtoul(argv[3], NULL, 0);
	mode = (int)strtol(argv[4], NULL, 8);
	file = open(argv[5], O_RDONLY | O_CLOEXEC);
	create = atoi(argv[6]);
	wait_between = (useconds_t)atoi(argv[7]);
	umask(0);
	prctl(PR_SET_PDEATHSIG, SIGKILL); /* whatever ends the test */
	if (!root || file < 0)
		trouble("her files");
	if (create ? mshare(name, start, 2 * AREA, O_CREAT | O_EXCL | O_RDWR, (mode_t)mode) < 0
		   : mshare(name, start, 2 * AREA, O_RDWR, 0) < 0)
		trouble("mshare");
	if (argc > 8) {
		pthread_create(&thread, NULL, attach_other, argv[8]);
		usleep(200000);
	}
	for (uint64_t round = 1;; round++)
		one_round(round, file);
}
