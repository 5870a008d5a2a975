// A std::unordered_map of std::string that lies in a region, with everything that it has.
//
//   map make NAME START SIZE COUNT    build it
//   map look NAME COUNT               look every key up, and one that is not there
#include <mshare.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <unordered_map>

namespace
{
struct Arena {
	char *next, *end;
};

// At the begin of the region: every address in it is good in every process.
Arena *arena;

template <class T> struct Allocator {
	using value_type = T;
	Allocator() = default;
	template <class U> Allocator(const Allocator<U> &) {}
	T *allocate(std::size_t count)
	{
		std::uintptr_t at = reinterpret_cast<std::uintptr_t>(arena->next);
		char *place = reinterpret_cast<char *>((at + alignof(T) - 1) & ~(alignof(T) - 1));
		if (place + count * sizeof(T) > arena->end)
			throw std::bad_alloc();
		arena->next = place + count * sizeof(T);
		return reinterpret_cast<T *>(place);
	}
	void deallocate(T *, std::size_t) {}
	template <class U> bool operator==(const Allocator<U> &) const { return true; }
};

using String = std::basic_string<char, std::char_traits<char>, Allocator<char>>;

struct Hash {
	std::size_t operator()(const String &string) const
	{
		return std::hash<std::string_view>()(std::string_view(string));
	}
};

using Map = std::unordered_map<String, String, Hash, std::equal_to<String>,
			       Allocator<std::pair<const String, String>>>;

String key(long number)
{
	return String(number % 2 ? "k" : "a key that is too long to lie in the string itself ") +
	       String(std::to_string(number).c_str());
}

Map *map_at(char *start)
{
	std::size_t at = (sizeof(Arena) + alignof(Map) - 1) & ~(alignof(Map) - 1);
	return reinterpret_cast<Map *>(start + at);
}

int make(const char *name, char *start, std::size_t size, long count)
{
	if (mshare(name, start, size, O_CREAT | O_EXCL | O_RDWR, 0600) < 0 ||
	    mshare_mmap(start, size, 3, 0x1 | 0x20 | 0x10, -1, 0) == reinterpret_cast<void *>(-1))
		return perror("mshare"), 1;
	arena = reinterpret_cast<Arena *>(start);
	arena->next = reinterpret_cast<char *>(map_at(start) + 1);
	arena->end = start + size;
	Map *map = new (map_at(start)) Map;
	for (long i = 0; i < count; i++)
		map->emplace(key(i), key(i * 7));
	return 0;
}

int look(const char *name, long count)
{
	struct mshare_info info;
	if (mshare_attach(name, O_RDONLY, &info) < 0)
		return perror("mshare_attach"), 1;
	char scratch[4096];
	Arena own = {scratch, scratch + sizeof scratch};
	arena = &own; // for the keys that are looked up
	const Map *map = map_at(reinterpret_cast<char *>(info.start));
	for (long i = 0; i < count; i++) {
		own.next = scratch;
		auto found = map->find(key(i));
		if (found == map->end() || found->second != key(i * 7))
			return fprintf(stderr, "%ld is wrong\n", i), 1;
	}
	own.next = scratch;
	if (map->size() != static_cast<std::size_t>(count) || map->count("no such key"))
		return fprintf(stderr, "there is something else\n"), 1;
	return 0;
}
} // namespace

int main(int argc, char **argv)
{
	if (argc == 6 && std::string(argv[1]) == "make")
		return make(argv[2], reinterpret_cast<char *>(std::strtoul(argv[3], nullptr, 0)),
			    std::strtoul(argv[4], nullptr, 0), std::atol(argv[5]));
	if (argc == 4 && std::string(argv[1]) == "look")
		return look(argv[2], std::atol(argv[3]));
	return 2;
}
