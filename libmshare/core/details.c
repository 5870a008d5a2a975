/* SPDX-License-Identifier: MIT */
/* What a region's file says beyond the letter: which region it is, and where it may lie. */
#include "internal.h"

#include <errno.h>
#include <unistd.h>

#define MOST_TRIES 64

int details_read(int region, struct details *details)
{
	ssize_t got = pread(region, details, sizeof *details, DETAILS_OFFSET);

	if (got == sizeof *details)
		return 0;
	if (got >= 0)
		errno = EPROTO;
	return -1;
}

void details_say_no_room(void)
{
	reason_say("no range of so many addresses is left for a region");
}

int details_place(int region, size_t length, bool placed, struct details *details)
{
	uint64_t wanted[2] = { length, 0 };

	for (int tries = 0; tries < MOST_TRIES; tries++) {
		int mapped;

		if (!placed && pwrite(region, wanted, sizeof wanted, DETAILS_OFFSET) < 0) {
			if (errno == ENOMEM)
				details_say_no_room();
			return -1;
		}
		placed = false;
		if (details_read(region, details) < 0)
			return -1;
		mapped = window_reserve((char *)(uintptr_t)details->start, details->size);
		if (mapped <= 0)
			return mapped;
		/* Something of this process is there: a sanitizer's, or another region. */
		wanted[1] = details->start + details->size;
	}
	details_say_no_room();
	errno = ENOMEM;
	return -1;
}
