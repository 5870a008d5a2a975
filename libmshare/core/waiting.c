/* SPDX-License-Identifier: MIT */
/*
 * Waiting for the next daemon when one has died.
 *
 * A daemon that is restarted takes its regions over, so a call that meets none waits
 * for a while: $MSHARE_RECONNECT_SECONDS, 30 by default, 0 for not at all.  All but
 * the constructor is async-signal-safe.
 */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#define NANOSECONDS 1000000000L
#define FIRST_PAUSE (5 * 1000000L) /* ns */
#define LONGEST_PAUSE (100 * 1000000L)
#define MOST_SECONDS 1000000.0

static double patience = 30; /* seconds */

__attribute__((constructor)) static void read_environment(void)
{
	const char *text = secure_getenv("MSHARE_RECONNECT_SECONDS");
	char *end;
	double seconds;

	if (!text || !*text)
		return;
	seconds = strtod(text, &end);
	if (*end == '\0' && seconds >= 0)
		patience = seconds < MOST_SECONDS ? seconds : MOST_SECONDS;
}

/*
 * Of a mount and of a socket.  A stopped daemon is none of it: its socket takes
 * connections and its mount requests, and who calls waits as for a slow one.
 */
bool daemon_is_gone(int error)
{
	return error == ENOTCONN || error == ECONNABORTED || error == ECONNREFUSED ||
	       error == ECONNRESET || error == EPIPE;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / NANOSECONDS;
}

bool wait_again(struct waiting *waiting)
{
	struct timespec pause = { 0, waiting->pause };
	double time = now();

	if (waiting->pause == 0) {
		waiting->until = time + patience;
		pause.tv_nsec = FIRST_PAUSE;
	}
	if (time >= waiting->until) {
		/* A bind mount is of the dead one's file system, whatever came in its place. */
		reason_say("no daemon has come; in a container: bind the directory above the "
			   "mount, as rslave");
		errno = ENOTCONN;
		return false;
	}
	nanosleep(&pause, NULL);
	waiting->pause = pause.tv_nsec * 2 < LONGEST_PAUSE ? pause.tv_nsec * 2 : LONGEST_PAUSE;
	return true;
}
