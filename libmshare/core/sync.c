/* SPDX-License-Identifier: MIT */
/*
 * Locks, semaphores and integers that processes share.
 *
 * A lock is a robust mutex of the C library's: the kernel marks it when its owner ends.  Its
 * bytes lie in the region, and with them the links of a list of this thread's that the C
 * library follows; so before it does they are checked, as malloc() checks its own.
 */
#include "heap.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NANOSECONDS 1000000000L

static pthread_once_t pattern_once = PTHREAD_ONCE_INIT;
static pthread_mutex_t pattern;

static void make_pattern(void)
{
	pthread_mutexattr_t attributes;

	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK);
	pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&pattern, &attributes);
	pthread_mutexattr_destroy(&attributes);
}

/* Only its kind is not zero: so it may be made while somebody has it already. */
void robust_make(struct robust *robust)
{
	pthread_once(&pattern_once, make_pattern);
	__atomic_store_n(&robust->mutex.__data.__kind, pattern.__data.__kind, __ATOMIC_RELEASE);
}

static int unclean(void)
{
	reason_say("the lock in the region has been overwritten");
	errno = EUCLEAN;
	return -1;
}

static bool is_lock(const struct robust *robust)
{
	pthread_once(&pattern_once, make_pattern);
	return __atomic_load_n(&robust->mutex.__data.__kind, __ATOMIC_ACQUIRE) ==
	       pattern.__data.__kind;
}

/* Whether a pointer can be read at that address: the kernel says EFAULT if not. */
static bool readable(const void *at)
{
	if ((uintptr_t)at % sizeof(void *))
		return false;
	return raw_syscall(SYS_rt_sigprocmask, ~0L, (long)at, 0, sizeof(long), 0, 0) == -EINVAL;
}

static void *untagged(const void *link)
{
	return (void *)((uintptr_t)link & ~(uintptr_t)1);
}

/* Both neighbours in the list of this thread's locks know it: the links are what they were. */
static bool is_linked(const struct robust *robust)
{
	const struct __pthread_internal_list *links = &robust->mutex.__data.__list;
	void *self = (void *)&links->__next;
	char *next = untagged(links->__next), *previous = untagged(links->__prev);
	void **back = (void **)(next - offsetof(struct __pthread_internal_list, __next));

	return readable(back) && readable(previous) && untagged(*back) == self &&
	       untagged(*(void **)previous) == self;
}

static struct timespec in(int milliseconds)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	time.tv_sec += milliseconds / 1000;
	time.tv_nsec += milliseconds % 1000 * (NANOSECONDS / 1000);
	if (time.tv_nsec >= NANOSECONDS) {
		time.tv_nsec -= NANOSECONDS;
		time.tv_sec++;
	}
	return time;
}

int robust_lock(struct robust *robust, int wait, bool *died)
{
	int result;

	*died = false;
	if (!is_lock(robust))
		return unclean();
	result = pthread_mutex_trylock(&robust->mutex);
	/* (A recursive call is EBUSY here and EDEADLK below.) */
	if (result == EBUSY && wait < 0) {
		result = pthread_mutex_lock(&robust->mutex);
	} else if (result == EBUSY) {
		struct timespec until = in(wait);

		result = pthread_mutex_clocklock(&robust->mutex, CLOCK_MONOTONIC, &until);
	}
	if (result == EOWNERDEAD) {
		__atomic_store_n(&robust->abandoned, 1, __ATOMIC_RELEASE);
		pthread_mutex_consistent(&robust->mutex);
		result = 0;
	}
	if (result == ENOTRECOVERABLE || result == EINVAL)
		return unclean();
	if (result != 0) {
		errno = result;
		return -1;
	}
	*died = __atomic_load_n(&robust->abandoned, __ATOMIC_ACQUIRE) != 0;
	return 0;
}

static bool is_owner(const struct robust *robust)
{
	uint32_t owner = (uint32_t)__atomic_load_n(&robust->mutex.__data.__lock, __ATOMIC_ACQUIRE);

	return (owner & FUTEX_TID_MASK) == (uint32_t)raw_syscall(SYS_gettid, 0, 0, 0, 0, 0, 0);
}

int robust_unlock(struct robust *robust)
{
	int result;

	if (!is_lock(robust))
		return unclean();
	if (!is_owner(robust)) {
		errno = EPERM;
		return -1;
	}
	if (!is_linked(robust))
		return unclean();
	result = pthread_mutex_unlock(&robust->mutex);
	if (result == 0)
		return 0;
	errno = result;
	return -1;
}

MSHARE_EXPORT int mshare_lock(void *lock, int wait, unsigned char *held)
{
	bool died;

	reason_forget();
	if (robust_lock(lock, wait, &died) < 0)
		return -1;
	if (held)
		*held = 1;
	if (!died)
		return 0;
	reason_say("who had the lock died with it: what it guards may be half done");
	errno = EOWNERDEAD;
	return -1;
}

MSHARE_EXPORT void mshare_repaired(void *lock)
{
	struct robust *robust = lock;

	/* Nobody else can know: a child that leaves its parent's block, say. */
	if (is_owner(robust))
		__atomic_store_n(&robust->abandoned, 0, __ATOMIC_RELEASE);
}

MSHARE_EXPORT int mshare_unlock(void *lock)
{
	reason_forget();
	return robust_unlock(lock);
}

static long futex(uint32_t *at, int op, uint32_t value, const struct timespec *wait)
{
	return raw_syscall(SYS_futex, (long)at, op, value, (long)wait, 0, 0);
}

static int take_one(uint32_t *semaphore)
{
	uint32_t value = __atomic_load_n(semaphore, __ATOMIC_ACQUIRE);

	while (value > 0) {
		if (__atomic_compare_exchange_n(semaphore, &value, value - 1, false,
						__ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return 0;
	}
	return -1;
}

MSHARE_EXPORT int mshare_semaphore_wait(void *semaphore, int wait)
{
	struct timespec until = in(wait < 0 ? 0 : wait), now, left;
	long result;

	reason_forget();
	while (take_one(semaphore) < 0) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		left.tv_sec = until.tv_sec - now.tv_sec;
		left.tv_nsec = until.tv_nsec - now.tv_nsec;
		if (left.tv_nsec < 0) {
			left.tv_nsec += NANOSECONDS;
			left.tv_sec--;
		}
		if (wait >= 0 && left.tv_sec < 0) {
			errno = ETIMEDOUT;
			return -1;
		}
		result = futex(semaphore, FUTEX_WAIT, 0, wait < 0 ? NULL : &left);
		if (result < 0 && result != -EAGAIN && result != -ETIMEDOUT) {
			errno = (int)-result;
			return -1;
		}
	}
	return 0;
}

MSHARE_EXPORT int mshare_semaphore_post(void *semaphore, int count)
{
	uint32_t *at = semaphore, value = __atomic_load_n(at, __ATOMIC_ACQUIRE);

	reason_forget();
	do {
		if (count < 1 || value > INT32_MAX || (uint32_t)count > INT32_MAX - value) {
			errno = count < 1 ? EINVAL : EOVERFLOW;
			return -1;
		}
	} while (!__atomic_compare_exchange_n(at, &value, value + (uint32_t)count, false,
					      __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
	futex(at, FUTEX_WAKE, (uint32_t)count, NULL);
	return 0;
}

#define ATOMIC_OF(bits)                                                                            \
	static uint64_t atomic##bits(int op, uint##bits##_t *at, uint##bits##_t value,            \
				     uint##bits##_t expected)                                     \
	{                                                                                          \
		switch (op) {                                                                      \
		case MSHARE_LOAD:                                                                  \
			return __atomic_load_n(at, __ATOMIC_SEQ_CST);                              \
		case MSHARE_EXCHANGE:                                                              \
			return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                   \
		case MSHARE_ADD:                                                                   \
			return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                    \
		case MSHARE_AND:                                                                   \
			return __atomic_fetch_and(at, value, __ATOMIC_SEQ_CST);                    \
		case MSHARE_OR:                                                                    \
			return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);                     \
		case MSHARE_XOR:                                                                   \
			return __atomic_fetch_xor(at, value, __ATOMIC_SEQ_CST);                    \
		default:                                                                           \
			__atomic_compare_exchange_n(at, &expected, value, false,                   \
						    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
			return expected;                                                           \
		}                                                                                  \
	}

ATOMIC_OF(8)
ATOMIC_OF(16)
ATOMIC_OF(32)
ATOMIC_OF(64)

MSHARE_EXPORT int mshare_atomic(enum mshare_atomic_op op, void *at, size_t width,
				unsigned long long value, unsigned long long expected,
				unsigned long long *before)
{
	if (op < MSHARE_LOAD || op > MSHARE_COMPARE_EXCHANGE || (uintptr_t)at % (width ? width : 1)) {
		errno = EINVAL;
		return -1;
	}
	switch (width) {
	case 1:
		*before = atomic8(op, at, (uint8_t)value, (uint8_t)expected);
		return 0;
	case 2:
		*before = atomic16(op, at, (uint16_t)value, (uint16_t)expected);
		return 0;
	case 4:
		*before = atomic32(op, at, (uint32_t)value, (uint32_t)expected);
		return 0;
	case 8:
		*before = atomic64(op, at, value, expected);
		return 0;
	default:
		errno = EINVAL;
		return -1;
	}
}
