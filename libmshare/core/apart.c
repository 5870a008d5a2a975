/* SPDX-License-Identifier: MIT */
/*
 * A call that a thread makes for whoever waits for it, for languages whose signal handlers
 * run in one thread, and not while that is in a call (Python's do).  Whoever waits comes back
 * for every signal, and may leave; the call goes on then.
 *
 * The thread takes no signals: they are for who waits.  It has ended when its end is told, so
 * that a program which forks then has as many threads as it believes.
 */
#include "internal.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#define MILLISECOND 1000000L /* ns */
#define SECOND (1000 * MILLISECOND)

static void make(struct mshare_apart *apart)
{
	switch (apart->call) {
	case APART_OPEN:
		apart->result = mshare_open(apart->request, apart->region);
		break;
	case APART_CLOSE:
		apart->result = mshare_close(apart->region);
		break;
	default:
		apart->result = mshare_forget_name(apart->region);
	}
	apart->error = errno;
	strcpy(apart->reason, mshare_reason());
}

MSHARE_EXPORT void mshare_apart_make(struct mshare_apart *apart)
{
	make(apart);
	apart->state = APART_DONE;
}

static void *run(void *argument)
{
	struct mshare_apart *apart = argument;

	if (apart->here)
		sched_setaffinity(0, sizeof apart->allowed, &apart->allowed);
	make(apart);
	sem_post(&apart->done);
	return NULL;
}

/*
 * A new thread is put on the idlest processor, and to wake another processor for it may take a
 * millisecond while others work there.  Who begins the call is about to wait: so the thread
 * begins here, and may go wherever the program may.
 */
static void begin_here(struct mshare_apart *apart, pthread_attr_t *attributes)
{
	int processor = sched_getcpu();
	cpu_set_t here;

	apart->here = processor >= 0 && processor < CPU_SETSIZE &&
		      sched_getaffinity(0, sizeof apart->allowed, &apart->allowed) == 0;
	if (!apart->here)
		return;
	CPU_ZERO(&here);
	CPU_SET(processor, &here);
	pthread_attr_setaffinity_np(attributes, sizeof here, &here);
}

MSHARE_EXPORT int mshare_apart_begin(struct mshare_apart *apart)
{
	sigset_t all, before;
	pthread_attr_t attributes;
	int failed;

	sem_init(&apart->done, 0, 0);
	pthread_attr_init(&attributes);
	begin_here(apart, &attributes);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	/* Set before it runs: who is interrupted here finds out by it. */
	apart->state = APART_RUNS;
	failed = pthread_create(&apart->thread, &attributes, run, apart);
	pthread_attr_destroy(&attributes);
	if (failed)
		apart->state = APART_NEVER;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	errno = failed;
	return failed ? -1 : 0;
}

MSHARE_EXPORT int mshare_apart_wait(struct mshare_apart *apart, int milliseconds)
{
	struct timespec until;

	if (apart->state == APART_RUNS) {
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec += milliseconds / 1000;
		until.tv_nsec += milliseconds % 1000 * MILLISECOND;
		if (until.tv_nsec >= SECOND) {
			until.tv_sec++;
			until.tv_nsec -= SECOND;
		}
		if (sem_clockwait(&apart->done, CLOCK_MONOTONIC, &until) < 0)
			return 1; /* time is up, or a signal has come */
		pthread_join(apart->thread, NULL);
		apart->state = APART_DONE;
	}
	return 0;
}
